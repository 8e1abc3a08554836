"""The ascent step of SAM as arithmetic on fragments of the weights, the same on every backend.

A backend hands over `Fragment`s, the pieces of the trainable weights that live on this rank, and the mathematics
is here once: the norm of the ascent gradient, and the move to w + e with

    SAM   (Foret 2021, arXiv 2010.01412, eq. 2):   e = rho * g / ||g||
    ASAM  (Kwon 2021, arXiv 2102.11600, eq. 8):    e = rho * |w|^2 g / || |w| g ||

all in fp32. A complex weight is a pair of real ones with one modulus |w|. Nothing here waits for the
device: a non-finite gradient becomes e = 0 by masking, not by a branch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .rounding import chunks, is_low_precision, stochastic_round

# Added to the norm, as in the paper's code: a zero gradient gives a zero perturbation instead of NaN.
NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class Fragment:
    """A piece of one trainable parameter on this rank.

    Attributes:
        name (`str`): name of the parameter.
        weight (`torch.Tensor`): the storage that the forward pass reads (or gathers from); perturbed in place.
        master (`torch.Tensor`): where w is held exactly while `weight` is perturbed, same shape as `weight`.
        grad (`torch.Tensor`): the ascent gradient, same shape as `weight`. It is used as scratch space.
        place (`str`): which piece of the parameter it is; replicas of a piece have the same.
        pairs (`bool`): whether the last dimension holds real and imaginary parts (`torch.view_as_real`).
    """

    name: str
    weight: torch.Tensor
    master: torch.Tensor
    grad: torch.Tensor
    place: str = ""
    pairs: bool = False


@dataclass(frozen=True)
class Perturbation:
    """What `Backend.perturb` did, as tensors that were not read yet.

    Attributes:
        norm (`torch.Tensor`): ||g|| (ASAM: ||w g||) over all shards, fp32, shape `()`.
        finite (`torch.Tensor`): bool, shape `()`; False if the ascent gradient held inf or NaN on any rank, in
            which case the weights were left as they were.
        kept (`torch.Tensor` or `None`): <dw, e> / ||e||^2, the share of e that the weights really moved by, fp32,
            shape `()`; `None` if it was not asked for.
    """

    norm: torch.Tensor
    finite: torch.Tensor
    kept: torch.Tensor | None


@torch.no_grad()
def squared_norms(fragments: list[Fragment], adaptive: bool) -> list[torch.Tensor]:
    """||g||^2 (ASAM: || |w| g ||^2) of each fragment, fp32, each of shape `()`."""
    if adaptive:
        return [_squared_norm_adaptive(fragment) for fragment in fragments]
    return [
        torch.linalg.vector_norm(fragment.grad, dtype=_at_least_fp32(fragment.grad.dtype)).square()
        for fragment in fragments
    ]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _squared_norm_adaptive(fragment: Fragment) -> torch.Tensor:
    pieces = []
    for weight, grad in chunks(fragment.master, fragment.grad):
        weight = weight.to(grad.device, _at_least_fp32(weight.dtype))
        if fragment.pairs:
            pieces.append((_squared(weight, pairs=True) * grad.to(weight.dtype).square()).sum())
        else:
            pieces.append(torch.linalg.vector_norm(weight * grad.to(weight.dtype)).square())
    return torch.stack(pieces).sum()


def _squared(weight: torch.Tensor, pairs: bool) -> torch.Tensor:
    """|w|^2, of the shape of `weight`."""
    squares = weight.square()
    if not pairs:
        return squares
    return squares.view(-1, 2).sum(dim=1, keepdim=True).expand(-1, 2).reshape(squares.shape)


def ascent_scale(rho: float, norm: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """rho / ||g||, or 0 where the gradient is not finite; fp32, shape `()`."""
    return torch.where(finite, rho / (norm + NORM_EPSILON), torch.zeros_like(norm))


@torch.no_grad()
def apply(
    fragments: list[Fragment],
    scale: torch.Tensor,
    finite: torch.Tensor,
    adaptive: bool,
    noise: Callable[[Fragment], torch.Generator] | None,
    measure: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write w + e into the weights of all fragments, e = scale * g (ASAM: scale * |w|^2 g).

    Args:
        fragments (`list[Fragment]`): the pieces of the weights on this rank; their gradients are overwritten.
        scale (`torch.Tensor`): result of [`ascent_scale`].
        finite (`torch.Tensor`): bool, shape `()`; e = 0 where False.
        adaptive (`bool`): ASAM instead of SAM.
        noise (`Callable` or `None`): gives the generator for a fragment that needs stochastic rounding; `None`
            rounds to nearest (which loses the perturbation; kept for comparison).
        measure (`bool`): whether to compute what of e the weights kept.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: <dw, e> and ||e||^2 of each fragment, in their order, if
        `measure`; else empty.
    """
    fast = [fragment for fragment in fragments if _is_plain_fp32(fragment)]
    if fast:
        _perturb_fp32(fast, scale, finite, adaptive)
    moved = []
    for fragment in fragments:
        if not _is_plain_fp32(fragment):
            moved.append(_perturb_mixed(fragment, scale, finite, adaptive, noise, measure))
        elif measure:
            pieces = chunks(fragment.weight, fragment.master, fragment.grad)
            moved.append(_add_up(_projection(*piece) for piece in pieces))
    return moved if measure else []


def _is_plain_fp32(fragment: Fragment) -> bool:
    tensors = (fragment.weight, fragment.master, fragment.grad)
    return all(t.dtype == torch.float32 and t.device == fragment.weight.device for t in tensors)


def _perturb_fp32(fragments, scale, finite, adaptive):
    """All-fp32 fragments take a handful of fused kernels and no scratch memory: the gradients turn into e."""
    for device in {fragment.weight.device for fragment in fragments}:
        here = [fragment for fragment in fragments if fragment.weight.device == device]
        grads = [fragment.grad for fragment in here]
        if adaptive:
            masters = [_modulus(fragment) for fragment in here]
            torch._foreach_mul_(grads, masters)
            torch._foreach_mul_(grads, masters)
        torch._foreach_mul_(grads, scale.to(device))
        blocked = ~finite.to(device)
        for grad in grads:
            # 0 * inf is NaN, so a zero scale alone would not cancel a non-finite gradient.
            grad.masked_fill_(blocked, 0.0)
        torch._foreach_add_([fragment.weight for fragment in here], grads)


def _modulus(fragment: Fragment) -> torch.Tensor:
    """|w|, or what has its square."""
    return _squared(fragment.master, pairs=True).sqrt() if fragment.pairs else fragment.master


def _perturb_mixed(fragment, scale, finite, adaptive, noise, measure):
    """Fragments with a 16-bit or an offloaded member go through fp32 scratch chunks on the device of the gradient."""
    moved = []
    # Where w is held in fp32, the cast below already dithers e by the spread of w; only a weight that is its own
    # master would round e away.
    dither = noise is not None and is_low_precision(fragment.master.dtype)
    device = fragment.grad.device
    scale, blocked = scale.to(device), ~finite.to(device)
    generator = noise(fragment) if dither else None
    for weight, master, grad in chunks(fragment.weight, fragment.master, fragment.grad):
        exact = master.to(device, _at_least_fp32(master.dtype))
        ascent = grad.to(exact.dtype) * scale
        if adaptive:
            ascent.mul_(_squared(exact, pairs=True)) if fragment.pairs else ascent.mul_(exact).mul_(exact)
        ascent.masked_fill_(blocked, 0.0)
        target = exact + ascent
        # Rounded before it travels: where the masters are offloaded, half of the bytes cross the bus.
        rounded = stochastic_round(target, weight.dtype, generator) if dither else target.to(weight.dtype)
        weight.copy_(rounded)
        if measure:
            moved.append(_projection(weight, master.to(weight.dtype), ascent))
    return _add_up(moved) if measure else None


def _projection(after, before, ascent):
    dtype = _at_least_fp32(after.dtype)
    change = (after.to(ascent.device, dtype) - before.to(ascent.device, dtype)).flatten()
    ascent = ascent.to(dtype).flatten()
    # Shares of one number, so that they may be added up and reduced together whatever the precision of the weights.
    return torch.dot(change, ascent).float(), torch.dot(ascent, ascent).float()


def _add_up(pairs):
    along, length = zip(*pairs, strict=True)
    return torch.stack(along).sum(), torch.stack(length).sum()
