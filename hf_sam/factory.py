"""Add SAM to any trainer or config class."""

import functools

from transformers import Trainer, TrainingArguments

from .arguments import SAMTrainingArguments
from .configs import config_with_sam
from .trainer import SAMMixin, SAMTrainer


def with_sam(cls: type, **defaults) -> type:
    """Add sharpness-aware steps to a trainer class, or the SAM fields to a config class.

    ```python
    from trl import DPOConfig, DPOTrainer
    SAMDPOConfig, SAMDPOTrainer = with_sam(DPOConfig), with_sam(DPOTrainer)
    ```

    Args:
        cls (`type`): a subclass of [`~transformers.Trainer`] or of [`~transformers.TrainingArguments`].
        defaults: for a config class, defaults for fields of [`SAMArguments`], e.g. `sam_rho=0.05`.

    Returns:
        `type`: `class SAM<name>(SAMMixin, cls)` or `class SAM<name>(SAMArguments, cls)`; equal calls return the same
        class. `cls` itself if it already supports SAM. Instances can be pickled if `cls` can be imported.

    Raises:
        TypeError: if `cls` is neither a trainer nor a config class, or the fields cannot be added.
    """
    if not isinstance(cls, type) or not issubclass(cls, Trainer | TrainingArguments):
        raise TypeError(f"with_sam takes a Trainer or TrainingArguments class, not {cls!r}.")
    if issubclass(cls, Trainer):
        if defaults:
            raise TypeError(f"with_sam({cls.__name__}) takes no defaults, because they belong to the config class.")
        return cls if issubclass(cls, SAMMixin) else _shipped(cls) or _trainer(cls)
    return config_with_sam(_shipped(cls) or cls, defaults)


@functools.cache
def _trainer(cls: type) -> type:
    return type(f"SAM{cls.__name__}", (SAMMixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def _shipped(cls: type) -> type | None:
    """The class that hf-sam defines for `cls`, or None."""
    if cls.__module__.startswith("trl.") and cls.__name__ in ("SFTConfig", "SFTTrainer"):
        from .sft import SAMSFTConfig, SAMSFTTrainer

        return SAMSFTConfig if issubclass(cls, TrainingArguments) else SAMSFTTrainer
    return {Trainer: SAMTrainer, TrainingArguments: SAMTrainingArguments}.get(cls)
