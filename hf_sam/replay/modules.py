"""State of modules that a forward pass advances: buffers, plain attributes, and frozen parameters.

BatchNorm statistics, the lengths that a dynamic RoPE has seen, queues, momentum encoders, counters.
"""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, fresh_counter, is_machinery
from .snapshot import Snapshot

# What `torch.nn.Module` itself keeps in its instances: hooks and the dicts of parameters, buffers and submodules.
_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
# Wrappers and quantized layers, whose attributes run the training: communication, compilation, optimizer state.
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "bitsandbytes", "torchao")


class ModuleStates:
    """Captures the state of modules, listed once a step.

    Args:
        modules (`Iterable[torch.nn.Module]`): modules whose submodules are captured with them.
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
        found: dict[int, torch.nn.Module] = {}
        for module in modules:
            for part in module.modules():
                found[id(part)] = part
        self._modules = list(found.values())
        self._frozen = list({id(param): param for param in frozen}.values())
        self._ignored = ignored
        self._switches = {} if switches is None else switches

    def add_to(self, snapshot: Snapshot) -> None:
        """Capture all of them."""
        for module in self._modules:
            self._add_buffers(module, snapshot)
            if not type(module).__module__.startswith(_WRAPPERS):
                self._add_attributes(module, snapshot)
        for param in self._frozen:
            snapshot.add_tensor(param)

    def _add_buffers(self, module, snapshot):
        buffers = module._buffers
        if not buffers:
            return
        content = dict(buffers)
        for buffer in content.values():
            if buffer is not None:
                snapshot.add_tensor(buffer)
        snapshot.on_restore(lambda end: _put_back(buffers, content, list(buffers)))

    def _add_attributes(self, module, snapshot):
        own = module.__dict__
        content = {name: own[name] for name in self._names(module)}
        for name, value in content.items():
            if type(value) not in IMMUTABLE_TYPES:
                snapshot.add(value)
                if isinstance(value, itertools.count):
                    content[name] = fresh_counter(value)
        snapshot.on_restore(lambda end: self._put_back_attributes(module, content, end))

    def _put_back_attributes(self, module, content, end):
        own, names = module.__dict__, self._names(module)
        if not end:
            kept = {name: own[name] for name in names if self._is_latch(module, name, content.get(name, False))}
            content = content | kept
            if is_machinery(module):  # what a library's module sets up on first use
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

    def _names(self, module) -> list[str]:
        # torch's own layers keep their weights in other forms under private names (`_flat_weights` of an LSTM).
        private = "_" if type(module).__module__.startswith("torch.nn.") else _NOTHING
        return [
            name
            for name, value in module.__dict__.items()
            if name not in _INTERNAL and not name.startswith(private) and _is_state(value) and not self._ignored(name)
        ]


_NOTHING = "\0"  # begins no name


def add_tree(module: torch.nn.Module, snapshot: Snapshot) -> None:
    """Capture a module and all that is in it."""
    ModuleStates([module], frozen_parameters(module)).add_to(snapshot)


def frozen_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of a module and its submodules that have no gradient."""
    return [param for param in module.parameters() if not param.requires_grad]


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
