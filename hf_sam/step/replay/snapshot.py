"""Capture the state of objects and everything they contain, and restore it in place."""

import array
import copy
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, attributes, fresh_counter, is_immutable, is_library_object, set_attribute
from .random_streams import generator_state, is_generator, set_generator_state
from .tensors import TensorContents

# Items of longer containers are not captured, because records may grow for the whole run.
_LONGEST = 4096
_DEEPEST = 6
_LARGEST_ARRAY_BYTES = 64 << 20


class Snapshot:
    """The state of some objects at the time they were added.

    Containers, arrays, tensors, random generators, modules and objects with attributes are restored in place, so that
    all references to them see the restored state.

    Args:
        tensors ([`TensorContents`]): decides which tensors are copied.
        capture_module (`Callable[[torch.nn.Module, Snapshot], None]`): adds a module to the snapshot.
        copy_everything (`bool`): copy all tensors, even if they are not known to change.
    """

    def __init__(
        self,
        tensors: TensorContents,
        capture_module: Callable[[torch.nn.Module, "Snapshot"], None],
        copy_everything: bool = False,
    ):
        self._tensors = tensors
        self._capture_module = capture_module
        self._copy_everything = copy_everything
        self._seen: dict[int, Any] = {}  # id -> object; the reference keeps the id unique
        self._restores: list[Callable[[], None]] = []
        self._others: list[Callable[[bool], None]] = []
        self._removals: list[Callable[[], None]] = []

    def restore(self, end: bool = True) -> None:
        """Restore the captured state.

        Args:
            end (`bool`, defaults to `True`): with `False`, another pass follows, and module attributes that mark
                one-time set-up are not restored.
        """
        for restore in self._restores:
            restore()
        for restore in self._others:
            restore(end)

    def remove_added(self) -> None:
        """Remove the items that were added to containers since the capture; counters keep their new values."""
        for removal in self._removals:
            removal()

    def on_restore(self, restore: Callable[[bool], None]) -> None:
        """Register a function that [`restore`] calls with `end`."""
        self._others.append(restore)

    def add(self, value: Any, *, explicit: bool = False, depth: int = 0) -> bool:
        """Capture the state of `value` and of its content.

        Args:
            value (`Any`): any object.
            explicit (`bool`): whether the user named this object. It is then captured even if it is large or belongs to
                a library.

        Returns:
            `bool`: whether the state of `value` can be restored.
        """
        if type(value) in IMMUTABLE_TYPES or id(value) in self._seen or is_immutable(value):
            return True
        self._seen[id(value)] = value
        if depth > _DEEPEST:
            return True
        if isinstance(value, torch.nn.Parameter):
            return True  # either trained, or captured with its module
        if isinstance(value, torch.Tensor):
            return self.add_tensor(value, always=explicit)
        if isinstance(value, torch.nn.Module):
            self._capture_module(value, self)
            return True
        if is_generator(value):
            state = generator_state(value)
            self._restores.append(lambda: set_generator_state(value, state))
            return True
        if isinstance(value, np.ndarray):
            return self._add_array(value, explicit)
        if isinstance(value, list | deque | bytearray | array.array):
            self._add_sequence(value, depth)
        elif isinstance(value, dict):
            self._add_dict(value, depth)
        elif isinstance(value, set):
            self._add_set(value)
        elif isinstance(value, tuple | frozenset):
            self._add_items(value, depth)
            return True
        elif is_library_object(value) and not explicit:
            return True
        return self._add_attributes(value, depth) or isinstance(
            value, list | deque | dict | set | bytearray | array.array
        )

    def add_tensor(self, tensor: torch.Tensor, *, always: bool = False) -> bool:
        """Capture the content of a tensor; see [`TensorContents.capture`]."""
        if tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
            return True  # a result of the forward pass, which each pass computes again
        state = self._tensors.capture(tensor, always=always or self._copy_everything)
        if state is not None:
            self._restores.append(state.restore)
        return True

    def _add_array(self, value, explicit):
        if not value.flags.writeable or (value.nbytes > _LARGEST_ARRAY_BYTES and not explicit):
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
        self._removals.append(restore)

    def _add_dict(self, value, depth):
        content = dict(value)
        self._add_items(content.values(), depth)
        for key, item in _counters(content.items()):
            content[key] = fresh_counter(item)

        def restore():
            if len(value) == len(content) and all(value.get(key, _MISSING) is item for key, item in content.items()):
                return
            value.clear()
            # One by one, because `Counter.update` adds and `dict.update` loses the order of an OrderedDict.
            for key, item in content.items():
                value[key] = item

        def remove_added():
            for key in [key for key in value if key not in content]:
                del value[key]

        self._restores.append(restore)
        self._removals.append(remove_added)

    def _add_set(self, value):
        content = set(value)

        def restore():
            value.clear()
            value.update(content)

        self._restores.append(restore)
        self._removals.append(restore)

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
        """Capture attributes of `owner` and their content.

        Args:
            owner (`Any`): an object.
            content (`dict[str, Any]`): the attributes to capture, with their values.
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
    """The `itertools.count` objects among some items. They cannot be reset, so they are replaced by new ones."""
    return [(key, item) for key, item in items if isinstance(item, itertools.count)]
