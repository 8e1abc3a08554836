"""The ascent step as arithmetic on fragments of the weights, the same on every backend.

A backend hands over `Fragment`s, the pieces of the trainable weights that live on this rank. Here the weights move to
w + e, with e = rho * d / ||n|| in fp32; what d and n are, a [`~hf_sam.step.variants.Variant`] says. A complex weight is
a pair of real ones. Nothing here waits for the device: a non-finite gradient becomes e = 0 by masking, not by a branch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .rounding import chunks, is_low_precision, stochastic_round
from .variants import Piece, Variant

# Added to the norm, as in the paper's code: a zero gradient gives a zero perturbation instead of NaN.
NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class Fragment:
    """A piece of one trainable parameter on this rank.

    Attributes:
        name (`str`): name of the parameter.
        weight (`torch.Tensor`): the storage that the forward pass reads (or gathers from); perturbed in place.
        master (`torch.Tensor`): holds w exactly while `weight` is perturbed; same shape as `weight`.
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

    def pieces(self) -> Iterator[Piece]:
        """The fragment in pieces small enough for fp32 copies."""
        for master, grad in chunks(self.master, self.grad):
            yield Piece(self.name, master, grad, self.pairs)


@dataclass(frozen=True)
class Perturbation:
    """What `Backend.perturb` did, as tensors that were not read yet.

    Attributes:
        norm (`torch.Tensor`): ||n|| (SAM: ||g||) over all shards, fp32, shape `()`.
        finite (`torch.Tensor`): bool, shape `()`; False if the ascent gradient held inf or NaN on any rank, in
            which case the weights were left as they were.
        kept (`torch.Tensor` or `None`): <dw, e> / ||e||^2, the share of e that the weights really moved by, fp32,
            shape `()`; `None` if it was not asked for.
    """

    norm: torch.Tensor
    finite: torch.Tensor
    kept: torch.Tensor | None


@torch.no_grad()
def squared_norms(fragments: list[Fragment], variant: Variant) -> list[torch.Tensor]:
    """||n||^2 of each fragment, at least fp32, each of shape `()`."""
    return [_added([variant.squared_norm(piece) for piece in fragment.pieces()]) for fragment in fragments]


def ascent_scale(rho: float, norm: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """rho / ||n||, or 0 where the gradient is not finite; shape `()`."""
    return torch.where(finite, rho / (norm + NORM_EPSILON), torch.zeros_like(norm))


@torch.no_grad()
def apply(
    fragments: list[Fragment],
    variant: Variant,
    scale: torch.Tensor,
    finite: torch.Tensor,
    noise: Callable[[Fragment], torch.Generator] | None = None,
    measure: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write w + e into the weights of all fragments, e = scale * d.

    Args:
        fragments (`list[Fragment]`): the pieces of the weights on this rank; their gradients are overwritten.
        variant ([`~hf_sam.step.variants.Variant`]): says what d is.
        scale (`torch.Tensor`): result of [`ascent_scale`].
        finite (`torch.Tensor`): bool, shape `()`; e = 0 where False.
        noise (`Callable`, *optional*): gives the generator for a fragment that needs stochastic rounding; not needed
            for fp32 and fp64 weights.
        measure (`bool`, defaults to `False`): whether to compute what of e the weights kept.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: <dw, e> and ||e||^2 of each fragment, in their order, if
        `measure`; else empty.
    """
    _perturb_fp32([fragment for fragment in fragments if _is_plain_fp32(fragment)], variant, scale, finite)
    moved = []
    for fragment in fragments:
        if not _is_plain_fp32(fragment):
            moved.append(_perturb_mixed(fragment, variant, scale, finite, noise, measure))
        elif measure:
            pieces = chunks(fragment.weight, fragment.master, fragment.grad)
            moved.append(_add_up(_projection(*piece) for piece in pieces))
    return moved if measure else []


def _is_plain_fp32(fragment: Fragment) -> bool:
    tensors = (fragment.weight, fragment.master, fragment.grad)
    return all(t.dtype == torch.float32 and t.device == fragment.weight.device for t in tensors)


def _perturb_fp32(fragments, variant, scale, finite):
    """All-fp32 fragments take a handful of fused kernels and no scratch memory: the gradients turn into e."""
    for device in {fragment.weight.device for fragment in fragments}:
        here = [fragment for fragment in fragments if fragment.weight.device == device]
        pieces = [Piece(fragment.name, fragment.master, fragment.grad, fragment.pairs) for fragment in here]
        variant.turn(pieces)
        ascent = [piece.gradient for piece in pieces]
        _scale(ascent, scale.to(device), ~finite.to(device))
        torch._foreach_add_([fragment.weight for fragment in here], ascent)


def _scale(ascent: list[torch.Tensor], scale: torch.Tensor, blocked: torch.Tensor) -> None:
    torch._foreach_mul_(ascent, scale)
    for tensor in ascent:
        # 0 * inf is NaN, so a zero scale alone would not cancel a non-finite gradient.
        tensor.masked_fill_(blocked, 0.0)


def _perturb_mixed(fragment, variant, scale, finite, noise, measure):
    """Fragments with a 16-bit or an offloaded member go through fp32 scratch chunks on the device of the gradient."""
    moved = []
    # Where w is held in fp32, the cast below already dithers e by the spread of w; only a weight that is its own
    # master would round e away.
    dither = is_low_precision(fragment.master.dtype)
    device = fragment.grad.device
    scale, blocked = scale.to(device), ~finite.to(device)
    generator = noise(fragment) if dither else None
    for weight, master, grad in chunks(fragment.weight, fragment.master, fragment.grad):
        piece = Piece(fragment.name, master, grad, fragment.pairs)
        variant.turn([piece])
        ascent = piece.gradient
        _scale([ascent], scale, blocked)
        target = piece.weight + ascent
        # Rounded before it travels: where the masters are offloaded, half of the bytes cross the bus.
        rounded = stochastic_round(target, weight.dtype, generator) if dither else target.to(weight.dtype)
        weight.copy_(rounded)
        if measure:
            moved.append(_projection(weight, master.to(weight.dtype), ascent))
    return _add_up(moved) if measure else None


def _projection(after, before, ascent):
    dtype = torch.promote_types(torch.float32, after.dtype)
    change = (after.to(ascent.device, dtype) - before.to(ascent.device, dtype)).flatten()
    ascent = ascent.to(dtype).flatten()
    # Shares of one number, so that they may be added up and reduced together whatever the precision of the weights.
    return torch.dot(change, ascent).float(), torch.dot(ascent, ascent).float()


def _add_up(pairs):
    along, length = zip(*pairs, strict=True)
    return torch.stack(along).sum(), torch.stack(length).sum()


def _added(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()
