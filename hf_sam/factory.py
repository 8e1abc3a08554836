"""SAM for a trainer or config class in one line."""

import functools
from dataclasses import dataclass

from transformers import Trainer, TrainingArguments

from .arguments import SAMArguments, SAMTrainingArguments
from .trainer import SAMMixin, SAMTrainer


def with_sam(cls: type) -> type:
    """The same trainer with sharpness-aware steps, or the same config with the SAM fields.

    ```python
    from trl import DPOConfig, DPOTrainer
    SAMDPOConfig, SAMDPOTrainer = with_sam(DPOConfig), with_sam(DPOTrainer)
    ```

    Args:
        cls (`type`): a subclass of [`~transformers.Trainer`] or of [`~transformers.TrainingArguments`].

    Returns:
        `type`: `class SAM<name>(SAMMixin, cls)` or `class SAM<name>(SAMArguments, cls)`, the same one in every call;
        `cls` itself if it has SAM already. Instances can be pickled as long as `cls` can be imported.

    Raises:
        TypeError: if `cls` is neither a trainer nor a config.
    """
    if not isinstance(cls, type) or not issubclass(cls, Trainer | TrainingArguments):
        raise TypeError(f"with_sam takes a Trainer or TrainingArguments class, not {cls!r}.")
    return cls if issubclass(cls, SAMMixin | SAMArguments) else _build(cls)


@functools.cache
def _build(cls: type) -> type:
    ready_made = {Trainer: SAMTrainer, TrainingArguments: SAMTrainingArguments}
    if cls in ready_made:
        return ready_made[cls]
    if cls.__module__.startswith("trl.") and cls.__name__ in ("SFTTrainer", "SFTConfig"):
        from . import sft

        return getattr(sft, f"SAM{cls.__name__}")
    mixin = SAMMixin if issubclass(cls, Trainer) else SAMArguments
    members = {"__module__": __name__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce}
    built = type(f"SAM{cls.__name__}", (mixin, cls), members)
    built.__sam_base__ = cls
    return dataclass(built) if mixin is SAMArguments else built


def _reduce(self, protocol):
    # Pickle looks classes up by name, which one that was made at run time does not have: `training_args.bin` holds
    # how to make it again.
    base = getattr(type(self), "__sam_base__", None)
    if base is None or type(self) is not with_sam(base):
        return object.__reduce_ex__(self, protocol)
    return _unpickled, (base,), self.__getstate__()


def _unpickled(base: type):
    cls = with_sam(base)
    return cls.__new__(cls)
