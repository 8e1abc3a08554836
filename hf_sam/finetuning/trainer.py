"""The trainer of a sweep: TRL's with SAM, and with a penalty on the distance to the base model."""

from dataclasses import dataclass

from ..baselines import L2Arguments, L2Mixin
from ..sft import SAMSFTConfig, SAMSFTTrainer


@dataclass(repr=False)
class SweepConfig(L2Arguments, SAMSFTConfig):
    """[`SAMSFTConfig`] with `l2_lambda`; see [`~hf_sam.baselines.L2Arguments`]."""


class SweepTrainer(L2Mixin, SAMSFTTrainer):
    """[`SAMSFTTrainer`] whose loss may have a penalty; its gradient is that at the unperturbed weights."""
