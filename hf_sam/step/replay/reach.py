"""Find the objects that a user's function can reach: its closure, the globals that it refers to, and their content."""

import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch

from .kinds import IMMUTABLE_TYPES, attributes, is_library_module, is_library_object
from .random_streams import is_generator

_DEEPEST = 6
# Only the first items of longer containers are searched, because they hold data rather than state.
_LONGEST = 64
# Results of the search; their content is not searched.
_RESULTS = (torch.nn.Module, torch.Tensor, torch.optim.Optimizer)


def reach(root: Any) -> Iterator[tuple[str, Any]]:
    """Modules, tensors, optimizers and random generators that `root` holds or, if it is a function, refers to.

    Args:
        root (`Any`): a function, method, object or container.

    Yields:
        `tuple[str, Any]`: path of the object (`head`, `losses.0`), and the object; each object once. Modules, and
        objects of libraries that run the training, are not searched.
    """
    yield from _reach("", root, set(), _DEEPEST)


def reach_class(cls: type) -> Iterator[tuple[str, Any]]:
    """[`reach`] for the methods of a user's class: the objects outside of `self` that they refer to."""
    seen: set[int] = set()
    for base in cls.__mro__:
        if not is_library_module(base.__module__):
            for method in vars(base).values():
                if isinstance(method, types.FunctionType):
                    yield from _reach("", method, seen, _DEEPEST)


def _reach(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if depth < 0 or id(value) in seen or (type(value) in IMMUTABLE_TYPES and not callable(value)):
        return
    seen.add(id(value))
    if isinstance(value, _RESULTS) or is_generator(value):
        yield name, value
        return
    for part, item in _parts(value):
        yield from _reach(f"{name}.{part}" if name else part, item, seen, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        yield from _referenced_by(value)
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, dict):
        for key, item in itertools.islice(list(value.items()), _LONGEST):
            yield (str(key) if isinstance(key, str | int) else ""), item
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(i), item) for i, item in enumerate(itertools.islice(value, _LONGEST)))
    elif not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType) and not is_library_object(value):
        yield from (attributes(value) or {}).items()


def _referenced_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if is_library_module(function.__module__ or ""):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the variable is not bound yet
            continue
    yield from ((name, item) for name, item in (function.__kwdefaults__ or {}).items())
    yield from (("", item) for item in function.__defaults__ or ())
    names = list(code_names(function))
    for name in names:
        found = function.__globals__.get(name)
        if isinstance(found, types.ModuleType):
            # For `losses.head`, where `losses` is a Python module: the attributes that the function refers to.
            yield from ((part, vars(found)[part]) for part in names if part in vars(found))
        elif found is not None:
            yield name, found
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__


def code_names(function: types.FunctionType) -> Iterator[str]:
    """Names of the globals and attributes that a function uses, including nested functions."""
    yield from _names(function.__code__)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
