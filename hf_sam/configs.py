"""Config classes with the SAM fields, made of any `TrainingArguments` class."""

import functools
import inspect
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .arguments import SAMArguments, SAMTrainingArguments

# The classes that hf-sam defines itself, by the class of the host that they extend.
SHIPPED: dict[type, type] = {TrainingArguments: SAMTrainingArguments}


def config_with_sam(cls: type, defaults: dict) -> type:
    """See [`~hf_sam.with_sam`].

    Args:
        cls (`type`): a subclass of [`~transformers.TrainingArguments`].
        defaults (`dict`): other defaults of the fields of [`SAMArguments`].
    """
    unknown = defaults.keys() - SAMArguments.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"with_sam knows no field {', '.join(map(repr, sorted(unknown)))}; see hf_sam.SAMArguments.")
    config = cls if issubclass(cls, SAMArguments) else SHIPPED.get(cls) or _config(cls)
    if not defaults:
        return config
    # Hashable, so that the same defaults give the same class every time.
    return _with_defaults(config, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in defaults.items()))


def turn_into_sam(args: TrainingArguments) -> None:
    """Give arguments that were made without the SAM fields these fields, with their defaults, in place."""
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
            "Rename them there."
        )
    members = {"__module__": __name__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce, "__sam_made_of__": (cls, ())}
    # The host's own repr leaves tokens out.
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
            f"with_sam cannot make a config out of {cls.__name__}, which has an __init__ of its own that a generated "
            f"one would replace. Write `class SAM{cls.__name__}(SAMArguments, {cls.__name__})` and pass the SAM "
            "fields on in its __init__."
        )


def _reduce(self, protocol):
    # Pickle looks a class up by its name, which one that was made at run time does not have: `training_args.bin`
    # holds how to make it again.
    made_of = vars(type(self)).get("__sam_made_of__")
    if made_of is None:  # a class that somebody derived from a made one
        return object.__reduce_ex__(self, protocol)
    return _unpickled, made_of, self.__dict__.copy()


def _unpickled(base: type, defaults: tuple):
    cls = config_with_sam(base, {name: list(v) if isinstance(v, tuple) else v for name, v in defaults})
    return cls.__new__(cls)
