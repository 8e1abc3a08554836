"""The ascent step: arithmetic on fragments of the weights, the same for every backend.

A backend passes `Fragment`s, the pieces of the trainable weights on this rank. They are moved to w + e, with
e = rho * d / ||n|| computed in fp32; the [`~hf_sam.step.variants.Variant`] defines d and n. Complex weights are treated
as pairs of real weights. Nothing here waits for the device: a non-finite gradient is masked to e = 0, not branched on.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .noise import uniform_noise
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
        grad (`torch.Tensor` or `None`): ascent gradient, shape of `weight`; overwritten. `None` without ascent pass.
        place (`str`): identifies the piece within the parameter; the same for all replicas of the piece.
        pairs (`bool`): whether the last dimension holds real and imaginary parts (`torch.view_as_real`).
        first (`int`): position of the first element in the flat parameter.
        draw (`Callable`): draws the random numbers of elements, see [`~hf_sam.step.noise.uniform_noise`].
        moments (`dict[str, torch.Tensor]`): moments of the optimizer that the variant needs, shape of `weight`.
    """

    name: str
    weight: torch.Tensor
    master: torch.Tensor
    grad: torch.Tensor | None
    place: str = ""
    pairs: bool = False
    first: int = 0
    draw: Callable[[str, int, int, torch.device], torch.Tensor] = uniform_noise
    moments: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where its perturbation is computed."""
        return self.weight.device if self.grad is None else self.grad.device

    @property
    def is_plain_fp32(self) -> bool:
        """Whether all its tensors are fp32 and on one device."""
        tensors = [self.weight, self.master, *self.moments.values(), *([] if self.grad is None else [self.grad])]
        return all(t.dtype == torch.float32 and t.device == self.device for t in tensors)

    def whole(self, key: str) -> Piece:
        """The fragment as one piece; `key` seeds its random numbers."""
        return self._piece(self.weight, self.master, self.grad, tuple(self.moments.values()), key, self.first)

    def pieces(self, key: str) -> Iterator[Piece]:
        """Split the fragment into pieces that are small enough for fp32 copies."""
        tensors = [self.weight, self.master, *self.moments.values(), *([] if self.grad is None else [self.grad])]
        first, count = self.first, 2 + len(self.moments)
        for weight, master, *rest in chunks(*tensors):
            yield self._piece(weight, master, *(rest[count - 2 :] or [None]), tuple(rest[: count - 2]), key, first)
            first += master.numel()

    def _piece(self, weight, master, grad, moments, key, first) -> Piece:
        def noise():
            return self.draw(f"{key} {self.name}", first, master.numel(), self.device)

        named = dict(zip(self.moments, moments, strict=True))
        return Piece(self.name, master, grad, self.pairs, named, noise, stored=weight)


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
def squared_norms(fragments: list[Fragment], variant: Variant, key: str = "") -> list[torch.Tensor]:
    """||n||^2 of each fragment, at least fp32, each of shape `()`; `key` seeds random numbers of the variant."""
    plain = {i: list(fragment.pieces(key)) for i, fragment in enumerate(fragments) if fragment.is_plain_fp32}
    norms = iter(variant.norms(list(itertools.chain(*plain.values()))) if plain else ())

    def norms_of(i: int, fragment: Fragment) -> Iterator[torch.Tensor]:
        if i in plain:
            return itertools.islice(norms, len(plain[i]))
        # Its pieces are copies, which must not all be in memory at once.
        return (variant.norms([piece])[0] for piece in fragment.pieces(key))

    return [_sum([norm.square() for norm in norms_of(i, fragment)]) for i, fragment in enumerate(fragments)]


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
    key: str = "",
    relative_noise: float = 0.0,
) -> torch.Tensor | None:
    """Write w + e into the weights of all fragments, e = scale * d (plus noise).

    Args:
        fragments (`list[Fragment]`): the pieces of the weights on this rank; their gradients are overwritten.
        variant ([`~hf_sam.step.variants.Variant`]): defines d.
        scale (`torch.Tensor`): result of [`ascent_scale`].
        finite (`torch.Tensor`): bool, shape `()`; e = 0 where False.
        noise (`Callable`, *optional*): returns the random generator for the stochastic rounding of a fragment; not
            needed for fp32 and fp64 weights.
        measure (`bool`, defaults to `False`): whether to measure how much of e is left in the stored weights.
        key (`str`, defaults to `""`): seeds random numbers.
        relative_noise (`float`, defaults to 0): adds relative_noise * w * u to e, elementwise, with u uniform of mean
            0 and variance 1.

    Returns:
        `torch.Tensor` or `None`: see [`Perturbation`]: `moved`; `None` without `measure`.
    """
    plain = [fragment for fragment in fragments if fragment.is_plain_fp32]
    ascents = _perturb_fp32(plain, variant, scale, finite, key, relative_noise)
    moved = []
    if measure:
        for fragment, ascent in zip(plain, ascents, strict=True):
            pieces = chunks(fragment.weight, fragment.master, ascent)
            moved.append(_sum_pairs(_projection(*piece) for piece in pieces))
    for fragment in fragments:
        if not fragment.is_plain_fp32:
            moved.append(_perturb_mixed(fragment, variant, scale, finite, noise, measure, key, relative_noise))
    return _sum_on(scale.device, moved) if measure else None


def _perturb_fp32(fragments, variant, scale, finite, key, relative_noise) -> list[torch.Tensor]:
    """Perturb all-fp32 fragments with a few fused kernels; e overwrites the gradients. Returns e of each fragment."""
    pieces = [fragment.whole(key) for fragment in fragments]
    for device in {fragment.device for fragment in fragments}:
        here = [piece for piece in pieces if piece.device == device]
        _to_perturbation(here, variant, scale.to(device), finite.to(device), relative_noise)
        torch._foreach_add_([piece.stored for piece in here], [piece.gradient for piece in here])
    return [piece.gradient for piece in pieces]


def _to_perturbation(pieces: list[Piece], variant: Variant, scale, finite, relative_noise: float) -> None:
    """Make the gradient of each piece e; 0 unless `finite`."""
    variant.to_direction(pieces)
    if directions := [piece.gradient for piece in pieces if piece.gradient is not None]:
        scale = scale * variant.sign
        if variant.passes == 2:
            # The scale is 0 if any number is not finite, but 0 * inf is NaN.
            for direction in directions:
                direction.nan_to_num_(0.0, 0.0, 0.0)
            torch._foreach_mul_(directions, scale)
        else:
            for piece, ascent in zip(pieces, torch._foreach_mul(directions, scale), strict=True):
                piece.gradient = ascent
    if relative_noise:
        size = torch.where(finite, relative_noise, 0.0)
        for piece in pieces:
            # Of a complex weight, both parts move, each by its share.
            noise = piece.noise().to(piece.dtype).mul_(size / 2**0.5 if piece.pairs else size)
            if piece.gradient is None:
                piece.gradient = noise.mul_(piece.magnitude)
            else:
                piece.gradient.addcmul_(piece.magnitude, noise)


def _perturb_mixed(fragment, variant, scale, finite, noise, measure, key, relative_noise):
    """Perturb a fragment with 16-bit or offloaded tensors in fp32 chunks, on the device of the gradient."""
    moved = []
    # With an fp32 master, the low bits of w act as dither when w + e is cast. A 16-bit master has no such bits, and
    # rounding to nearest would remove e.
    dither = is_low_precision(fragment.master.dtype)
    device = fragment.device
    scale, finite = scale.to(device), finite.to(device)
    generator = noise(fragment) if dither else None
    for piece in fragment.pieces(key):
        _to_perturbation([piece], variant, scale, finite, relative_noise)
        weight, ascent = piece.stored, piece.gradient
        target = piece.weight + ascent
        # Round before the transfer: with offloaded masters, this halves the bytes.
        rounded = stochastic_round(target, weight.dtype, generator) if dither else target.to(weight.dtype)
        weight.copy_(rounded)
        if measure:
            moved.append(_projection(weight, piece.master.to(weight.dtype), ascent))
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


def sum_on(device: torch.device, values: list[torch.Tensor]) -> torch.Tensor:
    """Sum of numbers on `device`, shape `()`; those on another device are summed there before one transfer."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for value in values:
        by_device.setdefault(value.device, []).append(value)
    sums = [torch.stack(some).sum().to(device) for some in by_device.values()]
    return sum(sums[1:], sums[0]) if sums else torch.zeros((), device=device)


def _sum(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()
