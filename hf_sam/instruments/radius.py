"""The rise of the loss at w + e against the radius of SAM, for gradients of some rows, as in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.progress import progress
from ..runtime.sharding import check_unsharded
from ..step.perturbation import NORM_EPSILON, Fragment, squared_norms
from ..step.variants import DEFAULT, Variant, get_variant
from .displacement import floating_parameters
from .documents import HeldOutData
from .gradients import check_precise, loss_gradient
from .loss import held_out_loss
from .measuring import measuring

# Without `rhos`, the radii are those numbers 0.1 * 2^k at which the loss rises by this much, in nats.
SMALLEST_RISE, LARGEST_RISE = 0.01, 4.0
MOST_RADII = 24


@dataclass(frozen=True)
class RadiusProfile:
    """How much the loss of a batch rises at w + e, where e follows the gradient of that batch.

    Attributes:
        rhos (`tuple[float, ...]`): radii, ascending.
        rises (`tuple[tuple[float, ...], ...]`): L(w + e) - L(w) in nats per token, of each batch at each radius;
            infinite where the loss is not finite.
        losses (`tuple[float, ...]`): L(w) of each batch, in nats per token.
        gradient_norms (`tuple[float, ...]`): norm that the variant divides by, of each batch; SAM: ||g||.
        ascent_batch_size (`int`): rows of one gradient.
        tokens (`int`): tokens of all batches that count.
        variant (`str`): name of the variant.
    """

    rhos: tuple[float, ...]
    rises: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    ascent_batch_size: int
    tokens: int
    variant: str = DEFAULT

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
        """The part of the mean rise that is not of first order: 1 - rho ||n|| / rise, at each radius."""
        return 1 - np.asarray(self.rhos) * np.mean(self.gradient_norms) / self.mean_rises

    def radius_at(self, rise: float) -> float | None:
        """The smallest radius at which the loss rises by `rise` nats on average; `None` if it is out of range."""
        known = np.isfinite(self.mean_rises) & (self.mean_rises > 0)
        rhos, rises = np.log(np.asarray(self.rhos)[known]), np.log(self.mean_rises[known])
        for i in range(1, len(rises)):
            if rises[i - 1] <= np.log(rise) <= rises[i]:
                return float(np.exp(np.interp(np.log(rise), rises[i - 1 : i + 1], rhos[i - 1 : i + 1])))
        return None

    def to_dict(self) -> dict:
        """For JSON."""
        means = {"mean_rises": self.mean_rises.tolist(), "curvature_shares": self.curvature_shares.tolist()}
        return {**vars(self), **means}


def radius_profile(
    model: torch.nn.Module,
    data: HeldOutData,
    *,
    rhos: Sequence[float] | None = None,
    ascent_batch_size: int = 16,
    batches: int = 4,
    variant: str = DEFAULT,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> RadiusProfile:
    """Measure the rise of the loss of a batch at w + e, over several radii and batches.

    In contrast to [`sam_sharpness`], e follows the gradient of as few rows as in training. With few rows, the
    gradient is longer and the loss rises faster, so radii are comparable only between batches of one size.

    Memory: a gradient and a copy of the weights.

    Args:
        model (`torch.nn.Module`): a causal language model, whole on each process.
        data ([`HeldOutData`]): documents of the kind of the training data, in rows as long as in training.
        rhos (`Sequence[float]`, *optional*): radii; when omitted, powers of 2 times 0.1, from a rise of 0.01 to one
            of 4 nats.
        ascent_batch_size (`int`, defaults to 16): rows of one gradient: those of an optimizer step on all devices, or
            with `sam_ascent_micro_batches` those of the ascent pass.
        batches (`int`, defaults to 4): number of batches to average over.
        variant (`str`, defaults to `"sam"`): `"sam"` or `"asam"`.
        batch_size (`int`, defaults to 8): rows per forward pass.
        parameters (`str`, *optional*): regular expression of the weights to perturb; all when omitted.
        seed (`int`, defaults to 0): chooses the rows.

    Raises:
        ValueError: if there are too few rows, a radius is not positive, the variant does not follow the gradient, or
            weights are quantized, in 16 bits, or sharded.
        FloatingPointError: if a gradient is not finite, or all gradients are 0.
    """
    perturbation = get_variant(variant)
    if perturbation.passes != 2 or perturbation.moments:
        raise ValueError(f"The variant {variant!r} does not follow the gradient of a batch; use 'sam' or 'asam'.")
    if rhos is not None and (not len(rhos) or min(rhos) <= 0):
        raise ValueError(f"rhos={list(rhos)} must be positive numbers.")
    parts = data.sample(ascent_batch_size, batches, seed)
    with measuring(model, exact=True) as inner:
        params = floating_parameters(inner, parameters, "A radius")
        check_precise(params, "A radius")
        check_unsharded(params, "A radius")
        origins = {name: param.detach().clone() for name, param in params.items()}
        measured = []
        try:
            for part in progress(parts, "radius", len(parts)):
                ray = _Ray(inner, params, origins, part, perturbation, batch_size)
                rises = ray.until_largest() if rhos is None else {rho: ray.rise(rho) for rho in sorted(rhos)}
                rhos = list(rises)
                measured.append((tuple(rises.values()), ray.loss, ray.norm))
        finally:
            _copy(params, origins)
    rises, losses, norms = zip(*measured, strict=True)
    tokens = sum(part.tokens for part in parts)
    return RadiusProfile(tuple(map(float, rhos)), rises, losses, norms, ascent_batch_size, tokens, variant)


class _Ray:
    """The line w + rho * d / ||n|| of one batch, and the loss of this batch on it."""

    def __init__(self, model, params, origins, data: HeldOutData, variant: Variant, batch_size: int):
        self.model, self.params, self.origins, self.data, self.batch_size = model, params, origins, data, batch_size
        self.loss = held_out_loss(model, data, batch_size=batch_size).loss
        gradient = loss_gradient(model, params, data, batch_size)
        fragments = [Fragment(name, param.detach(), param.detach(), gradient[name]) for name, param in params.items()]
        self.norm = torch.stack([square.double() for square in squared_norms(fragments, variant)]).sum().sqrt().item()
        if not 0 < self.norm < float("inf"):
            raise FloatingPointError(f"The gradient of a batch has norm {self.norm}; no radius can be measured.")
        pieces = [fragment.whole("") for fragment in fragments]
        variant.to_direction(pieces)
        self.directions = {piece.name: piece.gradient.view_as(params[piece.name]) for piece in pieces}

    @torch.no_grad()
    def rise(self, rho: float) -> float:
        """L(w + e) - L(w) in nats per token."""
        try:
            for name, param in self.params.items():
                param.copy_(self.origins[name]).add_(self.directions[name], alpha=rho / (self.norm + NORM_EPSILON))
            return held_out_loss(self.model, self.data, batch_size=self.batch_size).loss - self.loss
        except FloatingPointError:
            return float("inf")
        finally:
            _copy(self.params, self.origins)

    def until_largest(self) -> dict[float, float]:
        """Rises at 0.1 * 2^k, from the last radius whose rise is small to the first whose rise is large."""
        power = int(np.floor(np.log2(SMALLEST_RISE / self.norm / 0.1)))
        rises: dict[float, float] = {}
        while not rises or (list(rises.values())[-1] < LARGEST_RISE and len(rises) < MOST_RADII):
            rises[0.1 * 2.0**power] = self.rise(0.1 * 2.0**power)
            power += 1
        return rises


@torch.no_grad()
def _copy(params: dict[str, torch.nn.Parameter], origins: dict[str, torch.Tensor]) -> None:
    for name, origin in origins.items():
        params[name].copy_(origin)
