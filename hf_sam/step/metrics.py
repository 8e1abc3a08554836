"""The `sam/...` metrics. They are summed on the device and read only when the training loop logs."""

import torch
from accelerate.logging import get_logger

from .perturbation import Perturbation

logger = get_logger(__name__)

# `sam/perturbation_kept` is measured in every 16th SAM step. Ranks reduce what they measured, so it must not depend on
# when a rank reads its metrics.
_MEASURED_EVERY = 16
# Outside of this range, rounding changes the perturbation too much.
_KEPT_RANGE = (0.5, 1.5)
# To first order, the loss rises by rho * ||g||. If it rises by less than this fraction, the second pass did not see
# w + e. The check needs an expected rise of at least 32 times the spacing of floating-point numbers at the loss.
_LEAST_RISE = 1e-3
_SPACINGS = 32
# A larger rise (in nats, and relative to the loss) means that w + e is not in the neighbourhood of w. Rises of 3 nats
# from a loss of 2 still helped in every 10th step (docs/cost.md).
_LARGEST_RISE = (5.0, 2.0)


class SAMMetrics:
    """Running means of the `sam/...` metrics, and warnings when they show a problem.

    - `sam/perturbed_loss`: training loss at w + e, in nats.
    - `sam/sharpness`: `sam/perturbed_loss` minus the loss at w on the same micro-batches, in nats.
    - `sam/ascent_grad_norm`: the norm that the variant divides by (SAM: norm of the ascent gradient).
    - `sam/radius`: radius of the perturbation; only with `loss_rise`, where it differs from step to step.
    - `sam/perturbation_kept`: fraction <dw, e> / ||e||^2 of the perturbation that is left after the weights were
      rounded to their dtype; last measured value (every 16th SAM step).
    - `sam/skipped`: number of steps with a non-finite ascent gradient.

    Args:
        accelerator (`accelerate.Accelerator`): averages over ranks.
        low_precision (`bool`, defaults to `False`): whether the weights themselves are in 16 bits, without autocast.
    """

    _NAMES = ("perturbed_loss", "sharpness", "ascent_grad_norm", "radius")

    def __init__(self, accelerator, low_precision: bool = False):
        self._accelerator = accelerator
        self._low_precision = low_precision
        self._taken = 0
        self._kept: torch.Tensor | None = None
        self._warned: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Drop all steps since the last log."""
        self._sums: torch.Tensor | None = None
        self._steps = 0
        self._rho = 0.0
        self._loss_rise = self._noise = 0.0

    @property
    def measures_kept(self) -> bool:
        """Whether the next step measures `sam/perturbation_kept`; the same on all ranks."""
        return self._taken % _MEASURED_EVERY == 0

    def update(
        self,
        clean_loss: torch.Tensor,
        perturbed_loss: torch.Tensor,
        perturbation: Perturbation,
        *,
        rho: float,
        loss_rise: float = 0.0,
        noise: float = 0.0,
        uneven_inputs: bool = False,
    ) -> None:
        """Add one SAM step. A collective over all ranks, unless `uneven_inputs`; does not wait for the device.

        Args:
            clean_loss (`torch.Tensor`): loss at w over the ascent micro-batches of this rank, shape `()`.
            perturbed_loss (`torch.Tensor`): loss at w + e over the same micro-batches, shape `()`.
            perturbation ([`~hf_sam.step.perturbation.Perturbation`]): result of the backend.
            rho (`float`): radius of the perturbation, or the largest one.
            loss_rise (`float`, defaults to 0): what determines the radius, if not 0.
            noise (`float`, defaults to 0): relative noise on the weights.
            uneven_inputs (`bool`, defaults to `False`): whether other ranks may have run out of data. The means are
                then those of this rank.
        """
        finite = perturbation.finite
        device = self._accelerator.device
        means = (perturbed_loss, perturbed_loss - clean_loss, perturbation.norm, perturbation.radius)
        values = torch.stack([value.float().to(device) for value in means])
        # A skipped step has no perturbed loss. The last entry counts the steps that are not skipped.
        values = torch.where(finite.to(device), values, torch.zeros_like(values))
        values = torch.cat([values, values.new_full((1,), rho), finite.to(device, torch.float32).reshape(1)])
        if perturbation.moved is not None:
            values = torch.cat([values, perturbation.moved.to(device)])
        if not uneven_inputs:
            # One reduction for everything. Shards of equal size are not assumed: sums are divided after it.
            values = self._accelerator.reduce(values, reduction="mean")
        if perturbation.moved is not None:
            values, (along, length) = values[:-2], values[-2:]
            self._kept = along / length
        self._sums = values if self._sums is None else self._sums + values
        self._steps += 1
        self._taken += 1
        self._rho += rho
        self._loss_rise, self._noise = loss_rise, noise

    def pop(self) -> dict[str, float]:
        """Return the means since the last call and reset them; empty if SAM did not act.

        Waits for the device, but not for other ranks.
        """
        if self._steps == 0:
            return {}
        *sums, rho, taken = self._sums.tolist()
        logs = {"sam/skipped": self._steps - round(taken)}
        if taken > 0:
            logs.update({f"sam/{name}": total / taken for name, total in zip(self._NAMES, sums, strict=True)})
            kept = self._kept.item() if self._kept is not None else float("nan")
            if kept == kept:  # NaN if the measured step was skipped
                logs["sam/perturbation_kept"] = kept
            radius = logs["sam/radius"] if self._loss_rise else logs.pop("sam/radius")
            self._warn(logs, radius)
        if abs(rho - self._rho) > 1e-5 * max(rho, self._rho):
            self._warn_once(
                "ranks",
                f"The ranks use different SAM radii: rho is {self._rho / self._steps:g} on this rank and "
                f"{rho / self._steps:g} on average. Set the same rho on all ranks in each step.",
            )
        self.reset()
        return logs

    def _warn(self, logs: dict[str, float], rho: float) -> None:
        """Warn about each problem that the means show, once."""
        low, high = _KEPT_RANGE
        kept = logs.get("sam/perturbation_kept", 1.0)
        if not low <= kept <= high:
            self._warn_once(
                "kept",
                f"Only a fraction of {kept:.2f} of the SAM perturbation (expected: 1) is left in the stored weights; "
                "the rest is lost in rounding. Load the model in float32 and train with bf16=True or fp16=True, or "
                "raise the radius.",
            )
        perturbed, sharpness = logs["sam/perturbed_loss"], logs["sam/sharpness"]
        clean = perturbed - sharpness
        expected = rho * logs["sam/ascent_grad_norm"]
        visible = expected > _SPACINGS * self._spacing() * max(abs(clean), 1e-6)
        if visible and abs(sharpness) <= _LEAST_RISE * expected:
            self._warn_once(
                "unseen",
                f"The loss at the perturbed weights equals the loss at the unperturbed weights ({clean:.6g}), but it "
                f"should be higher by about {expected:.2g}. The second pass does not see the perturbation, so this is "
                "plain training at twice the cost. Likely causes: cached weights (an fp8, dequantized or transposed "
                "copy, merged adapters), a loss that is computed once for both passes, or a loss whose value does not "
                "depend on the perturbed parameters (its gradient may still be correct).",
            )
        rise, share = _LARGEST_RISE
        exploded = not perturbed < float("inf") or (sharpness > rise and sharpness > share * abs(clean))
        if exploded and clean < float("inf"):
            self._warn_once(
                "exploded",
                f"{self._setting(rho)} is too large: the loss is {perturbed:.4g} at the perturbed weights, but "
                f"{clean:.4g} at the unperturbed weights, so the gradient at the perturbed weights is of little use. "
                "Lower it; hf-sam suggest-rho measures radii to start with.",
            )

    def _setting(self, rho: float) -> str:
        radius = f"sam_loss_rise={self._loss_rise:g}" if self._loss_rise else f"sam_rho={rho:g}"
        return f"{radius} with sam_noise={self._noise:g}" if self._noise else radius

    def _spacing(self) -> float:
        # Losses may be computed or returned in 16 bits.
        exact = self._accelerator.mixed_precision == "no" and not self._low_precision
        return torch.finfo(torch.float32 if exact else torch.bfloat16).eps

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)
