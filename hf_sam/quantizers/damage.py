"""Quantization damage: how much held-out loss a quantized model has more than the plain one."""

from dataclasses import dataclass

import torch

from ..instruments.documents import HeldOutData
from ..instruments.loss import held_out_loss
from ..statistics.estimate import Estimate
from ..statistics.losses import HeldOutLoss, forgetting
from .loading import quantized
from .proof import Quantized


@dataclass(frozen=True)
class QuantizationDamage:
    """Loss before and after, and what was quantized.

    Attributes:
        quantized ([`Quantized`]): proof that it was.
        before, after ([`HeldOutLoss`]): held-out loss in full precision and quantized.
        damage ([`Estimate`]): after minus before, in nats per token.
    """

    quantized: Quantized
    before: HeldOutLoss
    after: HeldOutLoss
    damage: Estimate

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "quantized": self.quantized.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "damage": self.damage.to_dict(),
        }


def quantization_damage(
    model: torch.nn.Module,
    data,
    scheme: str = "nf4",
    *,
    before: HeldOutLoss | None = None,
    batch_size: int = 8,
    calibration: HeldOutData | None = None,
) -> QuantizationDamage:
    """Held-out loss of a model before and after quantization.

    Args:
        model (`torch.nn.Module`): a transformers model in floating point; it is not changed.
        data: what to measure on; see [`~hf_sam.instruments.held_out_loss`].
        scheme (`str`, defaults to `"nf4"`): one of `QUANTIZERS`.
        before ([`HeldOutLoss`], *optional*): of the model on this data, if it is known.
        batch_size (`int`, defaults to 8): rows a batch.
        calibration ([`HeldOutData`], *optional*): calibration data, for the schemes that need it.

    Raises:
        ValueError: see [`quantized`].
        ImportError: if a package is missing.
        MeasurementError: if quantization left a layer as it was.
        OSError: if there is no disk space for a temporary copy.
    """
    with quantized(model, scheme, calibration=calibration) as (small, proof):
        after = held_out_loss(small, data, batch_size=batch_size)
    before = before or held_out_loss(model, data, batch_size=batch_size)
    return QuantizationDamage(proof, before, after, forgetting(before, after))
