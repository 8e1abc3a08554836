"""The state of an object and of all that it holds, captured and put back in place."""

import array
import copy
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, attributes, fresh_counter, is_immutable, is_machinery, set_attribute
from .random_streams import generator_state, is_generator, set_generator_state
from .tensors import TensorContents

# Records grow for a whole run. What older entries hold is not looked into.
_LONGEST = 4096
_DEEPEST = 6
_LARGEST_ARRAY_BYTES = 64 << 20


class Snapshot:
    """What some objects held when they were added.

    Containers, arrays, tensors, random generators, modules and objects with attributes are put back in place, so that
    whoever else holds them sees it.

    Args:
        tensors ([`TensorContents`]): decides which tensors are copied.
        modules (`Callable[[torch.nn.Module, Snapshot], None]`): captures a module.
        copy_everything (`bool`): whether to copy all tensors, known to change or not.
    """

    def __init__(
        self,
        tensors: TensorContents,
        modules: Callable[[torch.nn.Module, "Snapshot"], None],
        copy_everything: bool = False,
    ):
        self._tensors = tensors
        self._modules = modules
        self._copy_everything = copy_everything
        self._seen: dict[int, Any] = {}  # held, so that no other object gets the same identity
        self._restores: list[Callable[[], None]] = []
        self._others: list[Callable[[bool], None]] = []
        self._take_backs: list[Callable[[], None]] = []

    def restore(self, end: bool = True) -> None:
        """Put everything back to what it was.

        Args:
            end (`bool`, defaults to `True`): `False` if another pass follows, for which what was set up meanwhile
                stays so.
        """
        for restore in self._restores:
            restore()
        for restore in self._others:
            restore(end)

    def take_back(self) -> None:
        """Remove what was appended to lists or added to dicts, and leave what was counted up."""
        for take_back in self._take_backs:
            take_back()

    def on_restore(self, restore: Callable[[bool], None]) -> None:
        """Have `restore` called with `end` when everything is put back."""
        self._others.append(restore)

    def add(self, value: Any, *, named: bool = False, depth: int = 0) -> bool:
        """Capture the state of `value`, and of what it holds.

        Args:
            value (`Any`): any object.
            named (`bool`): whether the user asked for this very object, so that it is looked into whatever it is.

        Returns:
            `bool`: whether `value` can be put back.
        """
        if type(value) in IMMUTABLE_TYPES or id(value) in self._seen or is_immutable(value):
            return True
        self._seen[id(value)] = value
        if depth > _DEEPEST:
            return True
        if isinstance(value, torch.nn.Parameter):
            return True  # either trained, or captured with its module
        if isinstance(value, torch.Tensor):
            return self.add_tensor(value, always=named)
        if isinstance(value, torch.nn.Module):
            self._modules(value, self)
            return True
        if is_generator(value):
            state = generator_state(value)
            self._restores.append(lambda: set_generator_state(value, state))
            return True
        if isinstance(value, np.ndarray):
            return self._add_array(value, named)
        if isinstance(value, list | deque | bytearray | array.array):
            self._add_sequence(value, depth)
        elif isinstance(value, dict):
            self._add_dict(value, depth)
        elif isinstance(value, set):
            self._add_set(value)
        elif isinstance(value, tuple | frozenset):
            self._add_items(value, depth)
            return True
        elif is_machinery(value) and not named:
            return True
        return self._add_attributes(value, depth) or isinstance(
            value, list | deque | dict | set | bytearray | array.array
        )

    def add_tensor(self, tensor: torch.Tensor, *, always: bool = False) -> bool:
        """Capture the content of a tensor; see [`TensorContents.capture`]."""
        if tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
            return True  # a result of the forward pass, which each pass makes anew
        state = self._tensors.capture(tensor, always=always or self._copy_everything)
        if state is not None:
            self._restores.append(state.restore)
        return True

    def _add_array(self, value, named):
        if not value.flags.writeable or (value.nbytes > _LARGEST_ARRAY_BYTES and not named):
            return True
        content = copy.deepcopy(value) if value.dtype.hasobject else value.copy()
        self._restores.append(lambda: np.copyto(value, content))
        return True

    def _add_sequence(self, value, depth):
        content = copy.copy(value)
        if isinstance(value, list | deque):
            self._add_items(value, depth)
            for i, item in _counters(enumerate(value)):
                content[i] = fresh_counter(item)

        def restore():
            if isinstance(value, deque):
                value.clear()
                value.extend(content)
            else:
                value[:] = content

        self._restores.append(restore)
        self._take_backs.append(restore)

    def _add_dict(self, value, depth):
        content = dict(value)
        self._add_items(content.values(), depth)
        for key, item in _counters(content.items()):
            content[key] = fresh_counter(item)

        def restore():
            if len(value) == len(content) and all(value.get(key, _MISSING) is item for key, item in content.items()):
                return
            value.clear()
            # One by one: `update` of a Counter adds up, and that of a dict forgets the order of an OrderedDict.
            for key, item in content.items():
                value[key] = item

        def take_back():
            for key in [key for key in value if key not in content]:
                del value[key]

        self._restores.append(restore)
        self._take_backs.append(take_back)

    def _add_set(self, value):
        content = set(value)

        def restore():
            value.clear()
            value.update(content)

        self._restores.append(restore)
        self._take_backs.append(restore)

    def _add_items(self, items, depth):
        if len(items) <= _LONGEST:
            for item in items:
                if type(item) not in IMMUTABLE_TYPES:
                    self.add(item, depth=depth + 1)

    def _add_attributes(self, value, depth):
        content = attributes(value)
        if content is None:
            return False
        self.add_namespace(value, content, depth)
        own = getattr(value, "__dict__", {})

        def remove_new():
            for name in [name for name in own if name not in content]:
                del own[name]

        self._restores.append(remove_new)
        return True

    def add_namespace(self, owner: Any, content: dict[str, Any], depth: int = 0) -> None:
        """Capture attributes of `owner`, and what they hold.

        Args:
            owner (`Any`): an object.
            content (`dict[str, Any]`): those of its attributes that are looked at, and their values.
        """
        content = dict(content)
        for name, item in content.items():
            if type(item) not in IMMUTABLE_TYPES:
                self.add(item, depth=depth + 1)
                if isinstance(item, itertools.count):
                    content[name] = fresh_counter(item)

        def restore():
            for name, item in content.items():
                if getattr(owner, name, _MISSING) is not item:
                    set_attribute(owner, name, item)

        self._restores.append(restore)


class _Missing:
    pass


_MISSING = _Missing()


def _counters(items):
    """Counters among some items. They cannot be put back, so fresh ones take their place."""
    return [(key, item) for key, item in items if isinstance(item, itertools.count)]
