"""The ascent step: arithmetic on fragments of the weights, the same for every backend.

A backend passes `Fragment`s, the pieces of the trainable weights on this rank. They are moved to w + e, with
e = rho * d / ||n|| computed in fp32; the [`~hf_sam.step.variants.Variant`] defines d and n. Complex weights are treated
as pairs of real weights. Nothing here waits for the device: a non-finite gradient is masked to e = 0, not branched on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .rounding import chunks, is_low_precision, stochastic_round
from .variants import Piece, Variant

# Added to the norm, as in the code of the paper, so that a zero gradient gives a zero perturbation instead of NaN.
NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class Fragment:
    """A piece of one trainable parameter on this rank.

    Attributes:
        name (`str`): name of the parameter.
        weight (`torch.Tensor`): storage that the forward pass reads or gathers from; perturbed in place.
        master (`torch.Tensor`): holds w exactly while `weight` is perturbed; shape of `weight`.
        grad (`torch.Tensor`): ascent gradient, shape of `weight`; overwritten.
        place (`str`): identifies the piece within the parameter; the same for all replicas of the piece.
        pairs (`bool`): whether the last dimension holds real and imaginary parts (`torch.view_as_real`).
    """

    name: str
    weight: torch.Tensor
    master: torch.Tensor
    grad: torch.Tensor
    place: str = ""
    pairs: bool = False

    def pieces(self) -> Iterator[Piece]:
        """Split the fragment into pieces that are small enough for fp32 copies."""
        for master, grad in chunks(self.master, self.grad):
            yield Piece(self.name, master, grad, self.pairs)


@dataclass(frozen=True)
class Perturbation:
    """Result of `Backend.perturb`, as tensors on the device that have not been read yet.

    Attributes:
        norm (`torch.Tensor`): ||n|| (SAM: ||g||) over all shards, fp32, shape `()`.
        radius (`torch.Tensor`): radius of the perturbation, fp32, shape `()`.
        finite (`torch.Tensor`): bool, shape `()`; False if the ascent gradient has inf or NaN on any rank. The weights
            are then not perturbed.
        moved (`torch.Tensor` or `None`): <dw, e> and ||e||^2 of the weights on this rank, where dw is the change of the
            stored weights, fp32, shape `(2,)`; `None` if they were not measured.
    """

    norm: torch.Tensor
    radius: torch.Tensor
    finite: torch.Tensor
    moved: torch.Tensor | None

    @property
    def kept(self) -> torch.Tensor:
        """<dw, e> / ||e||^2, the fraction of e that is left in the stored weights of this rank, shape `()`."""
        return self.moved[0] / self.moved[1]


@torch.no_grad()
def squared_norms(fragments: list[Fragment], variant: Variant) -> list[torch.Tensor]:
    """||n||^2 of each fragment, at least fp32, each of shape `()`."""
    return [_sum([variant.squared_norm(piece) for piece in fragment.pieces()]) for fragment in fragments]


def radius_of(rho: float, loss_rise: float, norm: torch.Tensor) -> torch.Tensor:
    """Radius of a step: rho, or min(loss_rise / ||n||, rho) if `loss_rise` is not 0 (arXiv 2605.10183, eq. 8).

    To first order, the loss rises by <g, e> = radius * ||n||.

    Args:
        rho (`float`): radius, or with `loss_rise` the largest radius (may be infinite).
        loss_rise (`float`): first-order rise of the loss, in nats; 0 for a fixed radius.
        norm (`torch.Tensor`): ||n|| of the gradient of the mean loss of the step, shape `()`.
    """
    if not loss_rise:
        return torch.full_like(norm, rho)
    return (loss_rise / (norm + NORM_EPSILON)).clamp(max=rho)


def ascent_scale(radius: torch.Tensor, norm: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """radius / ||n||, or 0 where the gradient is not finite; shape `()`."""
    return torch.where(finite, radius / (norm + NORM_EPSILON), torch.zeros_like(norm))


@torch.no_grad()
def apply(
    fragments: list[Fragment],
    variant: Variant,
    scale: torch.Tensor,
    finite: torch.Tensor,
    noise: Callable[[Fragment], torch.Generator] | None = None,
    measure: bool = False,
) -> torch.Tensor | None:
    """Write w + e into the weights of all fragments, e = scale * d.

    Args:
        fragments (`list[Fragment]`): the pieces of the weights on this rank; their gradients are overwritten.
        variant ([`~hf_sam.step.variants.Variant`]): defines d.
        scale (`torch.Tensor`): result of [`ascent_scale`].
        finite (`torch.Tensor`): bool, shape `()`; e = 0 where False.
        noise (`Callable`, *optional*): returns the random generator for the stochastic rounding of a fragment; not
            needed for fp32 and fp64 weights.
        measure (`bool`, defaults to `False`): whether to measure how much of e is left in the stored weights.

    Returns:
        `torch.Tensor` or `None`: see [`Perturbation`]: `moved`; `None` without `measure`.
    """
    _perturb_fp32([fragment for fragment in fragments if _is_plain_fp32(fragment)], variant, scale, finite)
    moved = []
    for fragment in fragments:
        if not _is_plain_fp32(fragment):
            moved.append(_perturb_mixed(fragment, variant, scale, finite, noise, measure))
        elif measure:
            pieces = chunks(fragment.weight, fragment.master, fragment.grad)
            moved.append(_sum_pairs(_projection(*piece) for piece in pieces))
    return _sum_on(scale.device, moved) if measure else None


def _is_plain_fp32(fragment: Fragment) -> bool:
    tensors = (fragment.weight, fragment.master, fragment.grad)
    return all(t.dtype == torch.float32 and t.device == fragment.weight.device for t in tensors)


def _perturb_fp32(fragments, variant, scale, finite):
    """Perturb all-fp32 fragments with a few fused kernels and no scratch memory: e overwrites the gradients."""
    for device in {fragment.weight.device for fragment in fragments}:
        here = [fragment for fragment in fragments if fragment.weight.device == device]
        pieces = [Piece(fragment.name, fragment.master, fragment.grad, fragment.pairs) for fragment in here]
        variant.to_direction(pieces)
        ascent = [piece.gradient for piece in pieces]
        _scale(ascent, scale.to(device), ~finite.to(device))
        torch._foreach_add_([fragment.weight for fragment in here], ascent)


def _scale(ascent: list[torch.Tensor], scale: torch.Tensor, blocked: torch.Tensor) -> None:
    torch._foreach_mul_(ascent, scale)
    for tensor in ascent:
        # 0 * inf is NaN, so a zero scale alone would not cancel a non-finite gradient.
        tensor.masked_fill_(blocked, 0.0)


def _perturb_mixed(fragment, variant, scale, finite, noise, measure):
    """Perturb a fragment with 16-bit or offloaded tensors in fp32 chunks, on the device of the gradient."""
    moved = []
    # With an fp32 master, the low bits of w act as dither when w + e is cast. A 16-bit master has no such bits, and
    # rounding to nearest would remove e.
    dither = is_low_precision(fragment.master.dtype)
    device = fragment.grad.device
    scale, blocked = scale.to(device), ~finite.to(device)
    generator = noise(fragment) if dither else None
    for weight, master, grad in chunks(fragment.weight, fragment.master, fragment.grad):
        piece = Piece(fragment.name, master, grad, fragment.pairs)
        variant.to_direction([piece])
        ascent = piece.gradient
        _scale([ascent], scale, blocked)
        target = piece.weight + ascent
        # Round before the transfer: with offloaded masters, this halves the bytes.
        rounded = stochastic_round(target, weight.dtype, generator) if dither else target.to(weight.dtype)
        weight.copy_(rounded)
        if measure:
            moved.append(_projection(weight, master.to(weight.dtype), ascent))
    return _sum_pairs(moved) if measure else None


def _projection(after, before, ascent):
    dtype = torch.promote_types(torch.float32, after.dtype)
    change = (after.to(ascent.device, dtype) - before.to(ascent.device, dtype)).flatten()
    ascent = ascent.to(dtype).flatten()
    # Always fp32, so that fragments of different precision can be summed and reduced together.
    return torch.dot(change, ascent).float(), torch.dot(ascent, ascent).float()


def _sum_pairs(pairs):
    return torch.stack([torch.stack(pair) for pair in pairs]).sum(0)


def _sum_on(device, moved):
    return torch.stack([pair.to(device) for pair in moved]).sum(0) if moved else torch.zeros(2, device=device)


def _sum(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()
