"""The rise of the loss at w + e against the size of e, for gradients of some rows, as in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.progress import progress
from ..runtime.sharding import check_unsharded
from ..step.noise import uniform_noise
from ..step.perturbation import Fragment, squared_norms
from ..step.variants import DEFAULT, VARIANTS, get_variant
from .displacement import floating_parameters
from .documents import HeldOutData
from .gradients import check_precise, loss_gradient
from .loss import held_out_loss
from .measuring import measuring

NOISE, MOMENTUM = "noise", "momentum"
# Without `rhos`, the radii are those numbers 0.1 * 2^k at which the loss rises by this much, in nats.
SMALLEST_RISE, LARGEST_RISE = 0.01, 4.0
_POWERS = range(-13, 12)


@dataclass(frozen=True)
class RadiusProfile:
    """How much the loss of a batch rises at w + e.

    Attributes:
        rhos (`tuple[float, ...]`): radii, or of noise the standard deviation relative to each weight; ascending.
        rises (`tuple[tuple[float, ...], ...]`): L(w + e) - L(w) in nats per token, of each batch at each radius;
            infinite where the loss is not finite.
        losses (`tuple[float, ...]`): L(w) of each batch, in nats per token.
        slopes (`tuple[float, ...]`): <g, e> / rho of each batch, the rise per radius to first order; of SAM ||g||.
        ascent_batch_size (`int`): rows of one gradient.
        tokens (`int`): tokens of all batches that count.
        kind (`str`): what e is.
    """

    rhos: tuple[float, ...]
    rises: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    slopes: tuple[float, ...]
    ascent_batch_size: int
    tokens: int
    kind: str = DEFAULT

    @property
    def mean_rises(self) -> np.ndarray:
        """Mean over the batches, at each radius, in nats per token."""
        return np.mean(self.rises, axis=0)

    @property
    def standard_errors(self) -> np.ndarray:
        """Standard errors of `mean_rises`; NaN for one batch."""
        if len(self.rises) == 1:
            return np.full(len(self.rhos), np.nan)
        return np.std(self.rises, axis=0, ddof=1) / len(self.rises) ** 0.5

    @property
    def curvature_shares(self) -> np.ndarray:
        """The part of the mean rise that is not of first order: 1 - <g, e> / rise, at each radius."""
        return 1 - np.asarray(self.rhos) * np.mean(self.slopes) / self.mean_rises

    def radius_at(self, rise: float) -> float | None:
        """The smallest radius at which the loss rises by `rise` nats on average; `None` if it is out of range."""
        known = np.isfinite(self.mean_rises) & (self.mean_rises > 0)
        rhos, rises = np.log(np.asarray(self.rhos)[known]), np.log(self.mean_rises[known])
        for i in range(1, len(rises)):
            if rises[i - 1] <= np.log(rise) <= rises[i]:
                return float(np.exp(np.interp(np.log(rise), rises[i - 1 : i + 1], rhos[i - 1 : i + 1])))
        return None

    def is_uncertain_at(self, rho: float) -> bool:
        """Whether the standard error at the nearest radius exceeds half of the rise."""
        nearest = int(np.abs(np.log(np.asarray(self.rhos) / rho)).argmin())
        return bool(self.standard_errors[nearest] > self.mean_rises[nearest] / 2)

    def to_dict(self) -> dict:
        """For JSON."""
        means = {"mean_rises": self.mean_rises.tolist(), "curvature_shares": self.curvature_shares.tolist()}
        return {**vars(self), **means}


def radius_profile(
    model: torch.nn.Module,
    data: HeldOutData,
    *,
    kind: str = DEFAULT,
    rhos: Sequence[float] | None = None,
    ascent_batch_size: int = 16,
    batches: int = 4,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> RadiusProfile:
    """Measure the rise of the loss of a batch at w + e, over several sizes of e and batches.

    In contrast to [`sam_sharpness`], e follows the gradient of as few rows as in training. With few rows, the
    gradient is longer and the loss rises faster, so radii are comparable only between batches of one size.

    Memory: two gradients at most, and a copy of the weights.

    Args:
        model (`torch.nn.Module`): a causal language model, whole on each process.
        data ([`HeldOutData`]): documents of the kind of the training data, in rows as long as in training.
        kind (`str`, defaults to `"sam"`): what e is. `"sam"`, `"asam"`: that variant, along the gradient of the batch.
            `"noise"`: that of `sam_noise`. `"momentum"`: a model has no momentum, so e follows the difference of the
            gradients of two other batches. At a constant learning rate, momentum consists of such differences, because
            the mean gradient is what the optimizer has already followed.
        rhos (`Sequence[float]`, *optional*): radii; when omitted, powers of 2 times 0.1, from a rise of 0.01 to one
            of 4 nats.
        ascent_batch_size (`int`, defaults to 16): rows of one gradient: those of an optimizer step on all devices, or
            with `sam_ascent_micro_batches` those of the ascent pass.
        batches (`int`, defaults to 4): number of batches to average over.
        batch_size (`int`, defaults to 8): rows per forward pass.
        parameters (`str`, *optional*): regular expression of the weights to perturb; all when omitted.
        seed (`int`, defaults to 0): chooses the rows and the noise.

    Raises:
        ValueError: if there are too few rows, a radius is not positive, `kind` is unknown, or weights are quantized,
            in 16 bits, or sharded.
        FloatingPointError: if a gradient is not finite, or all gradients are 0.
    """
    _check_kind(kind)
    if rhos is not None and (not len(rhos) or min(rhos) <= 0):
        raise ValueError(f"rhos={list(rhos)} must be positive numbers.")
    parts = data.sample(ascent_batch_size, 3 * batches if kind == MOMENTUM else batches, seed)
    others = [parts.pop() for _ in range(2 * batches)] if kind == MOMENTUM else []
    with measuring(model, exact=True) as inner:
        params = floating_parameters(inner, parameters, "A radius")
        check_precise(params, "A radius")
        check_unsharded(params, "A radius")
        ray = _Ray(inner, params, batch_size)
        measured = []
        try:
            for i, part in enumerate(progress(parts, "radius", len(parts))):
                if kind == NOISE:
                    ray.follow_noise(part, f"radius {seed} {i}")
                elif kind == MOMENTUM:
                    ray.follow_difference(part, others[2 * i], others[2 * i + 1])
                else:
                    ray.follow_gradient(part, kind)
                rises = ray.in_range() if rhos is None else {rho: ray.rise(rho) for rho in sorted(rhos)}
                rhos = list(rises)
                measured.append((tuple(rises.values()), ray.loss, ray.slope))
        finally:
            ray.restore()
    all_rises, losses, slopes = zip(*measured, strict=True)
    tokens = sum(part.tokens for part in parts)
    return RadiusProfile(tuple(map(float, rhos)), all_rises, losses, slopes, ascent_batch_size, tokens, kind)


def _check_kind(kind: str) -> None:
    variant = VARIANTS.get(kind)
    if kind not in (NOISE, MOMENTUM) and (variant is None or variant.passes != 2 or variant.moments):
        raise ValueError(
            f"kind={kind!r} must be 'momentum', 'noise', or a variant that follows the gradient of a batch."
        )


class _Ray:
    """The line w + rho * d, and the loss of a batch on it."""

    def __init__(self, model: torch.nn.Module, params: dict[str, torch.nn.Parameter], batch_size: int):
        self.model, self.params, self.batch_size = model, params, batch_size
        self.origins = {name: param.detach().clone() for name, param in params.items()}

    def follow_gradient(self, data: HeldOutData, kind: str) -> None:
        """e is that of a variant, for the gradient of `data`."""
        self._begin(data)
        gradient = self._gradient(data)
        variant = get_variant(kind)
        fragments = [
            Fragment(name, param.detach(), param.detach(), gradient[name]) for name, param in self.params.items()
        ]
        self.slope = _norm(squared_norms(fragments, variant))
        pieces = [fragment.whole("") for fragment in fragments]
        variant.to_direction(pieces)
        directions = {piece.name: piece.gradient.view_as(self.params[piece.name]) for piece in pieces}
        self._directions = _scaled(directions, self.slope)

    def follow_difference(self, data: HeldOutData, first: HeldOutData, second: HeldOutData) -> None:
        """e follows the difference of the gradients of two other batches."""
        self._begin(data)
        difference = self._gradient(first)
        for name, value in self._gradient(second).items():
            difference[name] -= value
        self._directions = _scaled(difference, _norm([value.square().sum() for value in difference.values()]))
        self.slope = 0.0

    def follow_noise(self, data: HeldOutData, key: str) -> None:
        """e is w * u with random numbers u."""
        self._begin(data)
        self._directions = {
            name: origin * uniform_noise(f"{key} {name}", 0, origin.numel(), origin.device).view_as(origin)
            for name, origin in self.origins.items()
        }
        self.slope = 0.0

    def _begin(self, data: HeldOutData) -> None:
        self.restore()
        self.data, self.loss = data, held_out_loss(self.model, data, batch_size=self.batch_size).loss

    def _gradient(self, data: HeldOutData) -> dict[str, torch.Tensor]:
        return loss_gradient(self.model, self.params, data, self.batch_size)

    @torch.no_grad()
    def rise(self, rho: float) -> float:
        """L(w + rho d) - L(w) in nats per token; infinite if it is not finite."""
        for name, param in self.params.items():
            param.copy_(self.origins[name]).add_(self._directions[name], alpha=rho)
        try:
            return held_out_loss(self.model, self.data, batch_size=self.batch_size).loss - self.loss
        except FloatingPointError:
            return float("inf")
        finally:
            self.restore()

    def in_range(self) -> dict[float, float]:
        """Rises at 0.1 * 2^k, from the last radius whose rise is small to the first whose rise is large."""
        rises: dict[float, float] = {}
        for rho in self._grid():
            rise = self.rise(rho)
            if rise < SMALLEST_RISE:
                rises.clear()
            rises[rho] = rise
            if rise >= LARGEST_RISE:
                break
        return rises

    def _grid(self) -> Iterator[float]:
        for power in _POWERS:
            rho = 0.1 * 2.0**power
            # Where the rise is of first order, the radii that are too small are known.
            if 2 * rho * self.slope >= SMALLEST_RISE or not self.slope:
                yield rho

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to w."""
        for name, origin in self.origins.items():
            self.params[name].copy_(origin)


def _norm(squares: list[torch.Tensor]) -> float:
    norm = torch.stack([square.double() for square in squares]).sum().sqrt().item()
    if not 0 < norm < float("inf"):
        raise FloatingPointError(f"The gradient of a batch has norm {norm}; no radius can be measured.")
    return norm


def _scaled(directions: dict[str, torch.Tensor], norm: float) -> dict[str, torch.Tensor]:
    return {name: direction.div_(norm) for name, direction in directions.items()}
