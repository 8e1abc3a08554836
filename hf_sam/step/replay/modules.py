"""Module state that a forward pass may change: buffers, plain attributes, and frozen parameters.

Examples are BatchNorm statistics, the maximum length of a dynamic RoPE, queues, momentum encoders, and counters.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, fresh_counter, is_library_module, is_library_object
from .random_streams import is_generator
from .snapshot import Snapshot

# Attributes of `torch.nn.Module` itself: hooks and the dicts of parameters, buffers and submodules.
_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
# Wrappers and quantized layers, whose attributes run the training: communication, compilation, optimizer state.
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "bitsandbytes", "torchao")
# Packages that create classes at run time as subclasses of the module's class.
_GENERATED = ("torch.distributed.fsdp", "torch.nn.utils.parametrize")


class ModuleStates:
    """Captures the state of modules. Create one per step, because modules may be replaced.

    Modules of the user are captured with everything in their attributes. For modules of libraries, buffers, tensors and
    the assignment of attributes are captured, but not the content of containers, which are settings.

    Args:
        modules (`Iterable[torch.nn.Module]`): all modules, including submodules.
        frozen (`Iterable[torch.nn.Parameter]`): frozen parameters, which a forward pass may update.
        ignored (`Callable[[str], bool]`): whether an attribute with this name belongs to the training engine.
        flag_directions (`dict`): the values that boolean attributes have changed to, kept over the steps.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        frozen: Iterable[torch.nn.Parameter] = (),
        ignored: Callable[[str], bool] = lambda name: False,
        flag_directions: dict | None = None,
    ):
        self._frozen = list({id(param): param for param in frozen}.values())
        self._ignored = ignored
        self._flag_directions = {} if flag_directions is None else flag_directions
        unique = {id(module): module for module in modules}.values()
        self._buffers = [module._buffers for module in unique if module._buffers]
        self._modules = [module for module in unique if not _python_module(type(module)).startswith(_WRAPPERS)]
        # For each module: its attributes when it was last examined, and the names of those that can change in place.
        self._mutable_names: list[tuple[dict, list[str]]] = [({}, [])] * len(self._modules)

    def add_to(self, snapshot: Snapshot) -> None:
        """Capture the state of all modules."""
        for buffers in self._buffers:
            for buffer in buffers.values():
                if buffer is not None:
                    snapshot.add_tensor(buffer)
        contents = [dict(buffers) for buffers in self._buffers]
        attributes = [self._captured(i, module, snapshot) for i, module in enumerate(self._modules)]
        for param in self._frozen:
            snapshot.add_tensor(param)

        def restore(end: bool):
            for buffers, content in zip(self._buffers, contents, strict=True):
                _restore_entries(buffers, content, list(buffers))
            for module, content in zip(self._modules, attributes, strict=True):
                if not _same(module.__dict__, content):
                    self._restore_attributes(module, content, end)

        snapshot.on_restore(restore)

    def _captured(self, i: int, module: torch.nn.Module, snapshot: Snapshot) -> dict:
        """Capture the attributes of a module. Includes those of `torch.nn.Module`, since filtering is slower."""
        own = module.__dict__
        content = own.copy()
        known, holders = self._mutable_names[i]
        if not _same(own, known):
            holders = self._find_mutable_names(module)
            self._mutable_names[i] = content, holders
        for name in holders:
            value = own[name]
            snapshot.add(value)
            if isinstance(value, itertools.count):
                content = content | {name: fresh_counter(value)}
        return content

    def _find_mutable_names(self, module) -> list[str]:
        """Names of attributes whose values can change in place."""
        kinds = (torch.Tensor, np.ndarray) if is_library_module(_python_module(type(module))) else object
        return [
            name
            for name, value in module.__dict__.items()
            if type(value) not in IMMUTABLE_TYPES
            and (isinstance(value, kinds) or is_generator(value))
            and self._in_scope(module, name, value)
        ]

    def _in_scope(self, module, name, value) -> bool:
        # torch's own layers keep their weights in other forms under private names (`_flat_weights` of an LSTM).
        private = name.startswith("_") and _python_module(type(module)).startswith("torch.nn.")
        return name not in _INTERNAL and not private and _is_state(value) and not self._ignored(name)

    def _restore_attributes(self, module, content, end):
        own = module.__dict__
        names = [name for name, value in own.items() if self._in_scope(module, name, value)]
        content = {name: value for name, value in content.items() if self._in_scope(module, name, value)}
        if not end:
            content |= {
                name: own[name] for name in names if self._is_setup_flag(module, name, content.get(name, False))
            }
            if is_library_module(_python_module(type(module))):  # keep what it creates on first use
                names = [name for name in names if name in content]
        _restore_entries(own, content, names)

    def _is_setup_flag(self, module, name, before) -> bool:
        """Whether a bool marks one-time set-up (e.g. of hooks), which would run again if the bool were restored."""
        now = module.__dict__[name]
        if type(now) is not bool or type(before) is not bool or now is before:
            return False
        # A bool that changes in both directions is state.
        directions = self._flag_directions.setdefault((id(module), name), set())
        directions.add(now)
        return len(directions) == 1


@functools.cache
def _python_module(cls: type) -> str:
    """Name of the Python module that defines `cls`, or the class that `cls` was generated from."""
    return next(base.__module__ for base in cls.__mro__ if not base.__module__.startswith(_GENERATED))


_NOTHING = object()


def _same(own: dict, content: dict) -> bool:
    """Whether all values are the same objects. Fast path; `==` would wait for the device."""
    return own.keys() == content.keys() and all(map(operator.is_, own.values(), content.values()))


def add_module(module: torch.nn.Module, snapshot: Snapshot) -> None:
    """Capture the state of a module and its submodules."""
    ModuleStates(module.modules(), frozen_parameters(module.modules())).add_to(snapshot)


def frozen_parameters(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Frozen parameters of the modules, without those of their submodules."""
    return [
        param
        for module in modules
        for param in module._parameters.values()
        if param is not None and not param.requires_grad
    ]


def _restore_entries(own: dict, content: dict, names: list[str]) -> None:
    """Restore the entries of `content` in `own`, and delete those in `names` that are not in `content`."""
    for name in names:
        if name not in content:
            del own[name]
    for name, value in content.items():
        if own.get(name, _NOTHING) is not value:
            own[name] = value


def _is_state(value) -> bool:
    """Whether an attribute is state. Functions, compiled code, and objects of libraries are not."""
    if type(value) in IMMUTABLE_TYPES:
        return not callable(value)
    if isinstance(value, torch.Tensor | np.ndarray | torch.Generator | np.random.Generator | np.random.RandomState):
        return True
    return not callable(value) and (type(value).__module__ in _STANDARD_MODULES or not is_library_object(value))


_STANDARD_MODULES = frozenset({"builtins", "collections", "array", "itertools", "random"})
