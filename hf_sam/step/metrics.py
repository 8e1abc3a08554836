"""What SAM reports: sums on the device over the steps between two logs, read only when the host logs."""

import torch
from accelerate.logging import get_logger

from .perturbation import Perturbation

logger = get_logger(__name__)

# What the weights kept of e is measured in every this-many-th SAM step. Measuring takes collectives, so it must not
# depend on when a rank reads its metrics.
_MEASURED_EVERY = 16
# Far from 1, the stored weights did not take the perturbation that was asked for.
_KEPT_RANGE = (0.5, 1.5)
# To first order the loss rises by rho * ||g||. A rise of less than this share of it, where that is well above the
# spacing of the numbers that losses are computed in, means that the second pass did not see w + e.
_LEAST_RISE = 1e-3
_SPACINGS = 32
# Losses that rise so much (nats, and as a share) are no longer those of a neighbourhood of w.
_LARGEST_RISE = (1.0, 0.5)


class SAMMetrics:
    """Running means of the `sam/...` metrics, and warnings about what they show.

    `sam/perturbed_loss` is the training loss at w + e, `sam/sharpness` that loss minus the one at w on the same
    micro-batches (nats), `sam/ascent_grad_norm` the norm that the variant divides by (SAM: of the ascent gradient),
    `sam/perturbation_kept` the share <dw, e> / ||e||^2 of the perturbation that the stored weights kept, as measured
    last (in every 16th SAM step), and `sam/skipped` the number of steps whose ascent gradient was not finite.

    Args:
        accelerator (`accelerate.Accelerator`): averages over ranks.
        coarse (`bool`, defaults to `False`): whether the model computes in 16 bits without the accelerator's doing.
    """

    _NAMES = ("perturbed_loss", "sharpness", "ascent_grad_norm")

    def __init__(self, accelerator, coarse: bool = False):
        self._accelerator = accelerator
        self._coarse = coarse
        self._taken = 0
        self._kept: torch.Tensor | None = None
        self._warned: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget all steps since the last log."""
        self._sums: torch.Tensor | None = None
        self._steps = 0
        self._rho = 0.0

    @property
    def wants_kept(self) -> bool:
        """Whether the coming step should measure what the weights kept of e; the same answer on all ranks."""
        return self._taken % _MEASURED_EVERY == 0

    def update(
        self,
        clean_loss: torch.Tensor,
        perturbed_loss: torch.Tensor,
        norm: torch.Tensor,
        perturbation: Perturbation,
        rho: float,
        *,
        alone: bool = False,
    ) -> None:
        """Add one SAM step; a collective over all ranks, but no wait for the device.

        Args:
            clean_loss (`torch.Tensor`): loss at w over the ascent micro-batches of this rank, shape `()`.
            perturbed_loss (`torch.Tensor`): loss at w + e over the same micro-batches, shape `()`.
            norm (`torch.Tensor`): norm of the ascent gradient, without loss scale, shape `()`.
            perturbation ([`~hf_sam.step.perturbation.Perturbation`]): what the backend did.
            rho (`float`): radius of the perturbation.
            alone (`bool`, defaults to `False`): whether other ranks may be out of data, so that this one reports its
                own means.
        """
        finite = perturbation.finite
        device = self._accelerator.device
        values = torch.stack([t.float().to(device) for t in (perturbed_loss, perturbed_loss - clean_loss, norm)])
        # A skipped step has no perturbed loss; the last entry counts the steps that the means are over.
        values = torch.where(finite.to(device), values, torch.zeros_like(values))
        values = torch.cat([values, values.new_full((1,), rho), finite.to(device, torch.float32).reshape(1)])
        if not alone:
            values = self._accelerator.reduce(values, reduction="mean")
        if perturbation.kept is not None:
            self._kept = perturbation.kept
        self._sums = values if self._sums is None else self._sums + values
        self._steps += 1
        self._taken += 1
        self._rho += rho

    def pop(self) -> dict[str, float]:
        """Means since the last call, and forget them; empty if SAM did not act in between.

        Waits for the device, but for no other rank.
        """
        if self._steps == 0:
            return {}
        *sums, rho, taken = self._sums.tolist()
        logs = {"sam/skipped": self._steps - round(taken)}
        if taken > 0:
            logs.update({f"sam/{name}": total / taken for name, total in zip(self._NAMES, sums, strict=True)})
            kept = self._kept.item() if self._kept is not None else float("nan")
            if kept == kept:  # NaN: the measured step was a skipped one
                logs["sam/perturbation_kept"] = kept
            self._warn(logs, self._rho / self._steps)
        if abs(rho - self._rho) > 1e-5 * max(rho, self._rho):
            self._warn_once(
                "ranks",
                f"The ranks do not use the same radius of SAM: it is {self._rho / self._steps:g} on this one and "
                f"{rho / self._steps:g} on average. Set the same rho on all ranks in each step.",
            )
        self.reset()
        return logs

    def _warn(self, logs: dict[str, float], rho: float) -> None:
        """Tell what the means show to be wrong, once each."""
        low, high = _KEPT_RANGE
        kept = logs.get("sam/perturbation_kept", 1.0)
        if not low <= kept <= high:
            self._warn_once(
                "kept",
                f"Of the SAM perturbation, the stored weights kept {kept:.2f} instead of 1: it is lost in their "
                "rounding. Load the model in float32 and train with bf16=True or fp16=True, or raise sam_rho.",
            )
        perturbed, sharpness = logs["sam/perturbed_loss"], logs["sam/sharpness"]
        clean = perturbed - sharpness
        expected = rho * logs["sam/ascent_grad_norm"]
        visible = expected > _SPACINGS * self._spacing() * max(abs(clean), 1e-6)
        if visible and abs(sharpness) <= _LEAST_RISE * expected:
            self._warn_once(
                "unseen",
                f"SAM acts, but the loss at the perturbed weights is the loss at the unperturbed ones ({clean:.6g}), "
                f"where it should rise by about {expected:.2g}. The second pass does not see the perturbation, so this "
                "is plain training at twice the price. Likely causes: a cache of weights (an fp8, dequantized or "
                "transposed copy, merged adapters), a loss computed once for both passes, or a loss whose value does "
                "not depend on the perturbed parameters (then its gradient may still be right).",
            )
        rise, share = _LARGEST_RISE
        exploded = not perturbed < float("inf") or (sharpness > rise and sharpness > share * abs(clean))
        if exploded and clean < float("inf"):
            self._warn_once(
                "exploded",
                f"sam_rho={rho:g} is too large here: at the perturbed weights the loss is {perturbed:.4g} instead of "
                f"{clean:.4g}, so that the gradient there tells little about the unperturbed weights. Lower sam_rho, "
                "e.g. tenfold, until sam/sharpness is a few per cent of the loss.",
            )

    def _spacing(self) -> float:
        # Losses may have been computed in 16 bits, or be returned so.
        exact = self._accelerator.mixed_precision == "no" and not self._coarse
        return torch.finfo(torch.float32 if exact else torch.bfloat16).eps

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)
