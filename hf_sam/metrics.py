"""What SAM reports: sums on the device over the steps between two logs, read only when the host logs."""

import torch

from .perturbation import Perturbation


class SAMMetrics:
    """Running means of the `sam/...` metrics.

    `sam/perturbed_loss` is the training loss at w + e, `sam/sharpness` that loss minus the one at w on the same
    micro-batches (nats), `sam/ascent_grad_norm` the norm of the ascent gradient (ASAM: of w * g),
    `sam/perturbation_kept` the share <dw, e> / ||e||^2 of the perturbation that the stored weights kept, measured in
    the first SAM step after a log, and `sam/skipped` the number of steps whose ascent gradient was not finite.

    Args:
        accelerator (`accelerate.Accelerator`): averages over ranks.
    """

    _NAMES = ("perturbed_loss", "sharpness", "ascent_grad_norm")

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Forget all steps since the last log."""
        self._sums: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None
        self._steps = 0

    @property
    def wants_kept(self) -> bool:
        """Whether the coming step should measure what the weights kept of e: once between two logs."""
        return self._steps == 0

    def update(
        self, clean_loss: torch.Tensor, perturbed_loss: torch.Tensor, norm: torch.Tensor, perturbation: Perturbation
    ) -> None:
        """Add one SAM step; a collective over all ranks, but no wait for the device.

        Args:
            clean_loss (`torch.Tensor`): loss at w over the ascent micro-batches of this rank, shape `()`.
            perturbed_loss (`torch.Tensor`): loss at w + e over the same micro-batches, shape `()`.
            norm (`torch.Tensor`): norm of the ascent gradient, without loss scale, shape `()`.
            perturbation ([`~hf_sam.perturbation.Perturbation`]): what the backend did.
        """
        finite = perturbation.finite
        device = self._accelerator.device
        values = torch.stack([t.float().to(device) for t in (perturbed_loss, perturbed_loss - clean_loss, norm)])
        # A skipped step has no perturbed loss; the last entry counts the steps that the means are over.
        values = torch.where(finite.to(device), values, torch.zeros_like(values))
        values = torch.cat([values, finite.to(device, torch.float32).reshape(1)])
        values = self._accelerator.reduce(values, reduction="mean")
        if perturbation.kept is not None:
            self._kept = perturbation.kept
        self._sums = values if self._sums is None else self._sums + values
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """Means since the last call, and forget them; empty if SAM did not act in between. Waits for the device."""
        if self._steps == 0:
            return {}
        *sums, taken = self._sums.tolist()
        logs = {"sam/skipped": self._steps - round(taken)}
        if taken > 0:
            logs.update({f"sam/{name}": total / taken for name, total in zip(self._NAMES, sums, strict=True)})
            kept = self._kept.item()
            if kept == kept:  # NaN: the measured step was a skipped one
                logs["sam/perturbation_kept"] = kept
        self.reset()
        return logs
