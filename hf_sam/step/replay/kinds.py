"""Classify objects for the replay: immutable values, state to restore, and objects of libraries to leave alone."""

import ast
import datetime
import decimal
import enum
import fractions
import itertools
import pathlib
import re
import sys
import types
import weakref
from typing import Any

import torch

# Exact types, so that the test is a set lookup.
IMMUTABLE_TYPES = frozenset(
    {
        int,
        float,
        complex,
        bool,
        str,
        bytes,
        range,
        slice,
        type,
        type(None),
        type(...),
        type(NotImplemented),
        types.FunctionType,
        types.BuiltinFunctionType,
        types.MethodType,
        types.ModuleType,
        types.CodeType,
        weakref.ref,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
        re.Pattern,
        decimal.Decimal,
        fractions.Fraction,
        datetime.datetime,
        datetime.date,
        datetime.timedelta,
    }
)
_IMMUTABLE_BASES = (enum.Enum, type, pathlib.PurePath, torch.dtype)

# Objects of these packages run the training or hold its data. Their attributes are not state of a forward pass, and
# restoring them (a communication counter, a tokenizer's truncation) would break them.
_LIBRARIES = frozenset(
    {
        "torch",
        "accelerate",
        "bitsandbytes",
        "datasets",
        "deepspeed",
        "hf_sam",
        "huggingface_hub",
        "numpy",
        "pandas",
        "peft",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "torchao",
        "transformer_engine",
        "transformers",
        "triton",
        "trl",
    }
)
# Modules of the standard library with containers that are plain Python objects with attributes.
_STANDARD_CONTAINERS = frozenset({"collections", "types"})


def is_immutable(value: Any) -> bool:
    """Whether `value` is immutable."""
    kind = type(value)
    return kind in IMMUTABLE_TYPES or isinstance(value, _IMMUTABLE_BASES)


def is_library_object(value: Any) -> bool:
    """Whether the class of `value` comes from a library that runs the training, or from the standard library."""
    return is_library_module(type(value).__module__)


def is_library_module(module: str) -> bool:
    """Whether a Python module of this name belongs to a library that runs the training, or the standard library."""
    root = module.partition(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root not in _STANDARD_CONTAINERS)


def fresh_counter(value: itertools.count) -> itertools.count:
    """Create a counter with the same state; `repr` is the only way to read the state of one."""
    return itertools.count(*ast.literal_eval(repr(value).removeprefix("count").replace(")", ",)")))


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, including slots; `None` if it cannot have attributes."""
    found = {}
    can_have_attributes = False
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            can_have_attributes = True
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        can_have_attributes = True
        found.update(own)
    return found if can_have_attributes else None


def set_attribute(value: Any, name: str, content: Any) -> None:
    """Set an attribute without calling `__setattr__` or a property of the class."""
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and (name in own or not hasattr(type(value), name)):
        own[name] = content
    else:
        object.__setattr__(value, name, content)
