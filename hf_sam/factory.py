"""SAM for a trainer or config class in one line."""

import functools

from transformers import Trainer, TrainingArguments

from .arguments import SAMTrainingArguments
from .configs import config_with_sam
from .trainer import SAMMixin, SAMTrainer


def with_sam(cls: type, **defaults) -> type:
    """The same trainer with sharpness-aware steps, or the same config with the SAM fields.

    ```python
    from trl import DPOConfig, DPOTrainer
    SAMDPOConfig, SAMDPOTrainer = with_sam(DPOConfig), with_sam(DPOTrainer)
    ```

    Args:
        cls (`type`): a subclass of [`~transformers.Trainer`] or of [`~transformers.TrainingArguments`].
        defaults: for a config, other defaults of the fields of [`SAMArguments`], e.g. `sam_rho=0.05`.

    Returns:
        `type`: `class SAM<name>(SAMMixin, cls)` or `class SAM<name>(SAMArguments, cls)`, the same one in every call;
        `cls` itself if it has SAM already. Instances can be pickled as long as `cls` can be imported.

    Raises:
        TypeError: if `cls` is neither a trainer nor a config, or a config to which the fields cannot be added.
    """
    if not isinstance(cls, type) or not issubclass(cls, Trainer | TrainingArguments):
        raise TypeError(f"with_sam takes a Trainer or TrainingArguments class, not {cls!r}.")
    if issubclass(cls, Trainer):
        if defaults:
            raise TypeError(f"with_sam({cls.__name__}) takes no defaults; they belong to the config.")
        return cls if issubclass(cls, SAMMixin) else _shipped(cls) or _trainer(cls)
    return config_with_sam(_shipped(cls) or cls, defaults)


@functools.cache
def _trainer(cls: type) -> type:
    return type(f"SAM{cls.__name__}", (SAMMixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def _shipped(cls: type) -> type | None:
    """The class that hf-sam defines for `cls` itself, if it does."""
    if cls.__module__.startswith("trl.") and cls.__name__ in ("SFTConfig", "SFTTrainer"):
        from .sft import SAMSFTConfig, SAMSFTTrainer

        return SAMSFTConfig if issubclass(cls, TrainingArguments) else SAMSFTTrainer
    return {Trainer: SAMTrainer, TrainingArguments: SAMTrainingArguments}.get(cls)
