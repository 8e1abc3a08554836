"""State of modules that a forward pass advances: buffers, plain attributes, and frozen parameters.

BatchNorm statistics, the lengths that a dynamic RoPE has seen, queues, momentum encoders, counters.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, fresh_counter, is_machinery, is_of_machinery
from .random_streams import is_generator
from .snapshot import Snapshot

# What `torch.nn.Module` itself keeps in its instances: hooks and the dicts of parameters, buffers and submodules.
_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
# Wrappers and quantized layers, whose attributes run the training: communication, compilation, optimizer state.
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "bitsandbytes", "torchao")
# Where classes are made at run time out of those of the modules that they are given.
_MADE = ("torch.distributed.fsdp", "torch.nn.utils.parametrize")


class ModuleStates:
    """Captures the state of modules, which are looked through once a step.

    Modules of one's own are captured with all that their attributes hold. Of the libraries' modules, whose containers
    are settings, buffers, tensors and what is assigned to attributes are captured.

    Args:
        modules (`Iterable[torch.nn.Module]`): the modules, their submodules among them.
        frozen (`Iterable[torch.nn.Parameter]`): parameters that no optimizer changes, but a forward pass may.
        ignored (`Callable[[str], bool]`): whether an attribute of that name is the backend's own.
        switches (`dict`): remembers over the steps which attributes were switched in which direction.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        frozen: Iterable[torch.nn.Parameter] = (),
        ignored: Callable[[str], bool] = lambda name: False,
        switches: dict | None = None,
    ):
        self._frozen = list({id(param): param for param in frozen}.values())
        self._ignored = ignored
        self._switches = {} if switches is None else switches
        unique = {id(module): module for module in modules}.values()
        self._buffers = [module._buffers for module in unique if module._buffers]
        self._modules = [module for module in unique if not _home(type(module)).startswith(_WRAPPERS)]
        # Of each module, names of attributes that can change in place, and the attributes that this was found out for.
        self._holders: list[tuple[dict, list[str]]] = [({}, [])] * len(self._modules)

    def add_to(self, snapshot: Snapshot) -> None:
        """Capture all of them."""
        for buffers in self._buffers:
            for buffer in buffers.values():
                if buffer is not None:
                    snapshot.add_tensor(buffer)
        contents = [dict(buffers) for buffers in self._buffers]
        attributes = [self._captured(i, module, snapshot) for i, module in enumerate(self._modules)]
        for param in self._frozen:
            snapshot.add_tensor(param)

        def put_back(end: bool):
            for buffers, content in zip(self._buffers, contents, strict=True):
                _put_back(buffers, content, list(buffers))
            for module, content in zip(self._modules, attributes, strict=True):
                if not _same(module.__dict__, content):
                    self._put_back_attributes(module, content, end)

        snapshot.on_restore(put_back)

    def _captured(self, i: int, module: torch.nn.Module, snapshot: Snapshot) -> dict:
        """The attributes of a module, those that torch keeps included, which costs less than to leave them out."""
        own = module.__dict__
        content = own.copy()
        known, holders = self._holders[i]
        if not _same(own, known):
            holders = self._holding(module)
            self._holders[i] = content, holders
        for name in holders:
            value = own[name]
            snapshot.add(value)
            if isinstance(value, itertools.count):
                content = content | {name: fresh_counter(value)}
        return content

    def _holding(self, module) -> list[str]:
        """Names of attributes whose values can change in place."""
        kinds = (torch.Tensor, np.ndarray) if is_of_machinery(_home(type(module))) else object
        return [
            name
            for name, value in module.__dict__.items()
            if type(value) not in IMMUTABLE_TYPES
            and (isinstance(value, kinds) or is_generator(value))
            and self._in_scope(module, name, value)
        ]

    def _in_scope(self, module, name, value) -> bool:
        # torch's own layers keep their weights in other forms under private names (`_flat_weights` of an LSTM).
        private = name.startswith("_") and _home(type(module)).startswith("torch.nn.")
        return name not in _INTERNAL and not private and _is_state(value) and not self._ignored(name)

    def _put_back_attributes(self, module, content, end):
        own = module.__dict__
        names = [name for name, value in own.items() if self._in_scope(module, name, value)]
        content = {name: value for name, value in content.items() if self._in_scope(module, name, value)}
        if not end:
            content |= {name: own[name] for name in names if self._is_latch(module, name, content.get(name, False))}
            if is_of_machinery(_home(type(module))):  # what a library's module sets up on first use
                names = [name for name in names if name in content]
        _put_back(own, content, names)

    def _is_latch(self, module, name, before) -> bool:
        """Whether an attribute says that something was set up (hooks, say), which it would be twice if put back."""
        now = module.__dict__[name]
        if type(now) is not bool or type(before) is not bool or now is before:
            return False
        # A switch that goes both ways is a state.
        directions = self._switches.setdefault((id(module), name), set())
        directions.add(now)
        return len(directions) == 1


@functools.cache
def _home(cls: type) -> str:
    """The Python module in which the class of a module was written."""
    return next(base.__module__ for base in cls.__mro__ if not base.__module__.startswith(_MADE))


_NOTHING = object()


def _same(own: dict, content: dict) -> bool:
    """Whether all values are the same objects; quick, as this is the rule. (`==` would wait for the device.)"""
    return own.keys() == content.keys() and all(map(operator.is_, own.values(), content.values()))


def add_tree(module: torch.nn.Module, snapshot: Snapshot) -> None:
    """Capture a module and all that is in it."""
    ModuleStates(module.modules(), frozen_parameters(module.modules())).add_to(snapshot)


def frozen_parameters(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Parameters of modules, without those of their submodules, that have no gradient."""
    return [
        param
        for module in modules
        for param in module._parameters.values()
        if param is not None and not param.requires_grad
    ]


def _put_back(own: dict, content: dict, names: list[str]) -> None:
    """Give `own` the entries of `content` back, and take those of `names` away that were not there."""
    for name in names:
        if name not in content:
            del own[name]
    for name, value in content.items():
        if own.get(name, _NOTHING) is not value:
            own[name] = value


def _is_state(value) -> bool:
    """Whether an attribute is state. Functions, compiled code, and objects of the libraries that train are not."""
    if type(value) in IMMUTABLE_TYPES:
        return not callable(value)
    if isinstance(value, torch.Tensor | np.ndarray | torch.Generator | np.random.Generator | np.random.RandomState):
        return True
    return not callable(value) and (type(value).__module__ in _PLAIN or not is_machinery(value))


_PLAIN = frozenset({"builtins", "collections", "array", "itertools", "random"})
