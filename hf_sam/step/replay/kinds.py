"""What kinds of objects there are for a replay: values that nothing can change, state, and machinery to leave alone."""

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

# Exact types, for a test that is as fast as a lookup.
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
# putting them back (a communication counter, a tokenizer's truncation) would break them.
_MACHINERY = frozenset(
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
# Containers of the standard library that are written in Python, and so are objects with attributes.
_STANDARD_CONTAINERS = frozenset({"collections", "types"})


def is_immutable(value: Any) -> bool:
    """Whether nothing can change `value`."""
    kind = type(value)
    return kind in IMMUTABLE_TYPES or isinstance(value, _IMMUTABLE_BASES)


def is_machinery(value: Any) -> bool:
    """Whether `value` belongs to a library that runs the training, or to the standard library (locks, files)."""
    return is_of_machinery(type(value).__module__)


def is_of_machinery(module: str) -> bool:
    """Whether a Python module of this name belongs to those libraries."""
    root = module.partition(".")[0]
    return root in _MACHINERY or (root in sys.stdlib_module_names and root not in _STANDARD_CONTAINERS)


def fresh_counter(value: itertools.count) -> itertools.count:
    """Another counter that goes on where this one is; Python has no other way to look at one."""
    return itertools.count(*ast.literal_eval(repr(value).removeprefix("count").replace(")", ",)")))


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, those in slots included; `None` if it has no place for any."""
    found = {}
    has_place = False
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            has_place = True
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        has_place = True
        found.update(own)
    return found if has_place else None


def set_attribute(value: Any, name: str, content: Any) -> None:
    """Set an attribute past whatever the class does when one is set."""
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and (name in own or not hasattr(type(value), name)):
        own[name] = content
    else:
        object.__setattr__(value, name, content)
