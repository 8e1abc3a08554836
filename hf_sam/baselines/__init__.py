"""Baselines for SAM: other methods against forgetting.

- [`wise_ft`]: interpolate between base and tuned weights (Wise-FT)
- [`with_rehearsal`]: mix old data into the fine-tuning data
- [`EWCMixin`], [`L2Mixin`]: penalize the distance to the weights of the base model, in any trainer
- [`estimate_fisher`]: estimate the importance of each weight, for EWC
- [`lora_config`]: LoRA, which learns less and forgets less
"""

from .fisher import estimate_fisher, load_fisher, save_fisher
from .lora import lora_config
from .penalties import (
    EWCArguments,
    EWCMixin,
    EWCTrainer,
    EWCTrainingArguments,
    L2Arguments,
    L2Mixin,
    L2Trainer,
    L2TrainingArguments,
)
from .rehearsal import with_rehearsal
from .wise_ft import interpolate, wise_ft

__all__ = [
    "EWCArguments",
    "EWCMixin",
    "EWCTrainer",
    "EWCTrainingArguments",
    "L2Arguments",
    "L2Mixin",
    "L2Trainer",
    "L2TrainingArguments",
    "estimate_fisher",
    "interpolate",
    "load_fisher",
    "lora_config",
    "save_fisher",
    "wise_ft",
    "with_rehearsal",
]
