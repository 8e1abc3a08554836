"""SAM for a trainer or config class in one line."""

import functools
from dataclasses import dataclass, field, fields

from transformers import Trainer, TrainingArguments

from .arguments import SAMArguments, SAMTrainingArguments
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
        return cls if issubclass(cls, SAMMixin) else _trainer(cls)
    unknown = defaults.keys() - SAMArguments.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"with_sam knows no field {', '.join(map(repr, sorted(unknown)))}; see hf_sam.SAMArguments.")
    config = cls if issubclass(cls, SAMArguments) else _config(cls)
    return _with_defaults(config, cls, defaults) if defaults else config


@functools.cache
def _trainer(cls: type) -> type:
    if cls is Trainer:
        return SAMTrainer
    if _is_trl(cls, "SFTTrainer"):
        from .sft import SAMSFTTrainer

        return SAMSFTTrainer
    return type(f"SAM{cls.__name__}", (SAMMixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})


@functools.cache
def _config(cls: type) -> type:
    if cls is TrainingArguments:
        return SAMTrainingArguments
    if _is_trl(cls, "SFTConfig"):
        from .sft import SAMSFTConfig

        return SAMSFTConfig
    for base in cls.__mro__[: cls.__mro__.index(TrainingArguments)]:
        if "__init__" in vars(base) and "__dataclass_fields__" not in vars(base):
            raise TypeError(
                f"with_sam cannot add fields to {cls.__name__}: {base.__name__} has an __init__ of its own, which a "
                f"generated one would replace. Write `class SAM{cls.__name__}(SAMArguments, {cls.__name__})` yourself "
                "and pass the SAM fields on in its __init__."
            )
    taken = sorted(cls.__dataclass_fields__.keys() & SAMArguments.__dataclass_fields__.keys())
    if taken:
        raise TypeError(
            f"with_sam cannot add fields to {cls.__name__}, which has {', '.join(taken)} with a meaning of its own. "
            "Rename them there."
        )
    members = {"__module__": __name__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce, "__sam_base__": cls}
    return dataclass(type(f"SAM{cls.__name__}", (SAMArguments, cls), members))


def _with_defaults(config: type, base: type, defaults: dict) -> type:
    """`config` with other defaults; its instances are pickled as those of `with_sam(base)`."""
    members = {"__module__": __name__, "__doc__": config.__doc__, "__reduce_ex__": _reduce, "__sam_base__": base}
    annotations = {}
    for known in fields(config):
        if known.name in defaults:
            value = defaults[known.name]
            default = {"default_factory": lambda value=value: list(value)} if isinstance(value, list) else {}
            members[known.name] = field(**(default or {"default": value}), metadata=known.metadata)
            annotations[known.name] = known.type
    return dataclass(type(config.__name__, (config,), {**members, "__annotations__": annotations}))


def _is_trl(cls: type, name: str) -> bool:
    return cls.__module__.startswith("trl.") and cls.__name__ == name


def _reduce(self, protocol):
    # Pickle looks a class up by its name, which one that was made at run time does not have: `training_args.bin`
    # holds how to make it again.
    base = vars(type(self)).get("__sam_base__")
    if base is None:
        return object.__reduce_ex__(self, protocol)
    return _unpickled, (base,), self.__dict__.copy()


def _unpickled(base: type):
    cls = with_sam(base)
    return cls.__new__(cls)
