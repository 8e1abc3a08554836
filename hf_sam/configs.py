"""Create config classes with the SAM fields from any `TrainingArguments` class."""

import functools
import inspect
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .arguments import SAMArguments, SAMTrainingArguments

# Config classes that hf-sam defines, by the class that they extend.
SHIPPED: dict[type, type] = {TrainingArguments: SAMTrainingArguments}


def config_with_sam(cls: type, defaults: dict) -> type:
    """See [`~hf_sam.with_sam`].

    Args:
        cls (`type`): a subclass of [`~transformers.TrainingArguments`].
        defaults (`dict`): defaults for fields of [`SAMArguments`].
    """
    unknown = defaults.keys() - SAMArguments.__dataclass_fields__.keys()
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise TypeError(f"with_sam got unknown fields: {names}. See hf_sam.SAMArguments for the fields.")
    config = cls if issubclass(cls, SAMArguments) else SHIPPED.get(cls) or _config(cls)
    if not defaults:
        return config
    # Hashable for the cache, so that equal defaults always give the same class.
    return _with_defaults(config, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in defaults.items()))


def add_sam_fields(args: TrainingArguments) -> None:
    """Add the SAM fields, with their defaults, to arguments without them, in place."""
    cls = config_with_sam(type(args), {})
    for known in fields(SAMArguments):
        setattr(args, known.name, known.default)
    args.__class__ = cls


@functools.cache
def _config(cls: type) -> type:
    _check_generated_init(cls)
    taken = sorted(cls.__dataclass_fields__.keys() & SAMArguments.__dataclass_fields__.keys())
    if taken:
        raise TypeError(
            f"with_sam cannot add fields to {cls.__name__}, which has {', '.join(taken)} with a meaning of its own. "
            "Rename these fields."
        )
    members = {"__module__": __name__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce, "__sam_made_of__": (cls, ())}
    # The repr of TrainingArguments hides tokens.
    return dataclass(repr=False)(type(f"SAM{cls.__name__}", (SAMArguments, cls), members))


@functools.cache
def _with_defaults(config: type, defaults: tuple) -> type:
    _check_generated_init(config)
    members = {"__module__": __name__, "__doc__": config.__doc__, "__reduce_ex__": _reduce}
    base, _ = vars(config).get("__sam_made_of__", (config, ()))
    members["__sam_made_of__"] = (base, defaults)
    annotations, chosen = {}, dict(defaults)
    for known in fields(config):
        if known.name in chosen:
            value = chosen[known.name]
            default = {"default_factory": functools.partial(list, value)} if isinstance(value, tuple) else {}
            members[known.name] = field(**(default or {"default": value}), metadata=known.metadata)
            annotations[known.name] = known.type
    return dataclass(repr=False)(type(config.__name__, (config,), {**members, "__annotations__": annotations}))


def _check_generated_init(cls: type) -> None:
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if accepted != {known.name for known in fields(cls) if known.init}:
        raise TypeError(
            f"with_sam cannot extend {cls.__name__}, which has an __init__ of its own that a generated one would "
            f"replace. Write `class SAM{cls.__name__}(SAMArguments, {cls.__name__})` with an __init__ that passes on "
            "the SAM fields."
        )


def _reduce(self, protocol):
    # Pickle finds classes by name, but this one is created at run time. So `training_args.bin` stores how to create it.
    made_of = vars(type(self)).get("__sam_made_of__")
    if made_of is None:  # a subclass of a generated class
        return object.__reduce_ex__(self, protocol)
    return _unpickled, made_of, self.__dict__.copy()


def _unpickled(base: type, defaults: tuple):
    cls = config_with_sam(base, {name: list(v) if isinstance(v, tuple) else v for name, v in defaults})
    return cls.__new__(cls)
