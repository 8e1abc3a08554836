"""What SAM has to be compared with: other ways to forget less.

- [`wise_ft`]: interpolate between base and tuned weights (Wise-FT)
- [`with_rehearsal`]: mix a share of old data into the fine-tuning data
- [`EWCMixin`], [`L2Mixin`]: a penalty that pulls the weights back to the base model, for any trainer
- [`estimate_fisher`]: the importance of each weight, for EWC
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
