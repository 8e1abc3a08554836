"""What a function of the user's can reach: its closure, the globals that it names, and what those hold."""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from .kinds import IMMUTABLE_TYPES, attributes, is_machinery, is_of_machinery
from .random_streams import is_generator

_DEEPEST = 6
_LONGEST = 1024
# These are found, not looked into.
_FOUND = (torch.nn.Module, torch.Tensor, torch.optim.Optimizer)


def reach(root: Any) -> Iterator[tuple[str, Any]]:
    """Modules, tensors, optimizers, random generators and other objects that `root` holds or, as a function, can name.

    Args:
        root (`Any`): a function, method, object or container.

    Yields:
        `tuple[str, Any]`: where it was found (`head`, `losses.0`), and the object; each object once. What is inside of
        modules, and of objects of the libraries that run the training, is not looked for.
    """
    yield from _reach("", root, set(), _DEEPEST)


def _reach(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if depth < 0 or id(value) in seen or (type(value) in IMMUTABLE_TYPES and not callable(value)):
        return
    seen.add(id(value))
    if isinstance(value, _FOUND) or is_generator(value):
        yield name, value
        return
    for part, item in _parts(value):
        yield from _reach(f"{name}.{part}" if name else part, item, seen, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        yield from _named_by(value)
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, dict):
        if len(value) <= _LONGEST:
            # Keys too: optimizers are kept by parameter as often as by name.
            yield from ((str(key) if isinstance(key, str | int) else "", item) for key, item in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        if len(value) <= _LONGEST:
            yield from ((str(i), item) for i, item in enumerate(value))
    elif not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType) and not is_machinery(value):
        yield from (attributes(value) or {}).items()


def _named_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if is_of_machinery(function.__module__ or ""):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    yield from ((name, item) for name, item in (function.__kwdefaults__ or {}).items())
    yield from (("", item) for item in function.__defaults__ or ())
    names = list(code_names(function))
    for name in names:
        found = function.__globals__.get(name)
        if isinstance(found, types.ModuleType):
            # `losses.head`: of a Python module, what the function names of it.
            yield from ((part, vars(found)[part]) for part in names if part in vars(found))
        elif found is not None:
            yield name, found
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__


def code_names(function: types.FunctionType) -> Iterator[str]:
    """Names of the globals and attributes that a function uses, functions in it included."""
    yield from _names(function.__code__)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
