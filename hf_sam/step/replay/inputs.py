"""Copy a micro-batch, so that the descent pass gets the same inputs as the ascent pass.

`compute_loss` and `forward` may change their inputs in place: mixup, clamped ids, shifted labels, a popped key.
"""

import copy
import itertools
from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
import torch

from .kinds import IMMUTABLE_TYPES, attributes, fresh_counter, is_immutable, set_attribute
from .random_streams import is_generator

# A view is copied without its storage if the storage is larger than the view by more than this factor.
_LARGEST_STORAGE = 2


class KeptInputs:
    """The unchanged inputs of a micro-batch, for two passes.

    Args:
        inputs (`Any`): tensors, arrays and objects in any containers. Tensors that share memory also share it in the
            copy. Models, functions, and tensors in an autograd graph are not copied.
        copied (`bool`, defaults to `True`): whether to copy them; not needed for a single pass at once.

    Raises:
        TypeError: if `inputs` contain an iterator that can be read only once.
    """

    def __init__(self, inputs: Any, copied: bool = True):
        self._given = inputs
        self._copier = _Copier()
        self._copy = self._copier.copy(inputs) if copied else inputs

    def for_ascent(self, *, last: bool) -> Any:
        """The input objects of the loop, as in plain training; a copy if the loop may have changed them since.

        Args:
            last (`bool`): whether this is the most recent micro-batch, so that the loop cannot have changed it.
        """
        if last or self._copier.unchanged():
            return self._given
        return _Copier().copy(self._copy)

    def for_descent(self) -> Any:
        """The copy."""
        return self._copy


class _Copier:
    def __init__(self):
        self._copies: dict[int, tuple[Any, Any]] = {}  # id -> (original, copy); the reference keeps the id unique
        self._storages: dict[int, torch.Tensor] = {}
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._arrays = False

    def unchanged(self) -> bool:
        """Whether the originals are certainly unchanged; changes of NumPy arrays cannot be detected."""
        return not self._arrays and all(tensor._version == version for tensor, version in self._versions)

    def copy(self, value: Any) -> Any:
        if type(value) in IMMUTABLE_TYPES or is_immutable(value):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = (value, value)  # for objects that contain themselves
            self._copies[id(value)] = (value, self._copy(value))
        return self._copies[id(value)][1]

    def _copy(self, value):
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, np.ndarray):
            self._arrays = True
            return copy.deepcopy(value) if value.dtype.hasobject else value.copy()
        if isinstance(value, torch.nn.Module) or callable(value):
            return value
        if is_generator(value):
            return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
        if isinstance(value, tuple):
            return _tuple_like(value, [self.copy(item) for item in value])
        if isinstance(value, frozenset):
            return value
        if isinstance(value, Iterator):
            return _copy_iterator(value)
        try:
            result = copy.copy(value)
        except Exception:  # locks, files, process groups: not data of a micro-batch
            return value
        if result is not value:
            # Registered before its content is copied, in case it contains itself.
            self._copies[id(value)] = (value, result)
            self._fill(value, result)
        return result

    def _fill(self, value, result):
        """Replace the content of a shallow copy by copies."""
        if isinstance(value, list | deque):
            for i, item in enumerate(value):
                result[i] = self.copy(item)
        elif isinstance(value, dict) or (isinstance(value, MutableMapping) and attributes(value) is None):
            for key, item in value.items():
                if (new := self.copy(item)) is not item:
                    result[key] = new
        for name, item in (attributes(value) or {}).items():
            if (new := self.copy(item)) is not item:
                set_attribute(result, name, new)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        in_graph = tensor.requires_grad and not tensor.is_leaf
        if in_graph or isinstance(tensor, torch.nn.Parameter) or tensor.is_inference():
            return tensor
        self._versions.append((tensor, tensor._version))
        copied = self._copy_with_storage(tensor)
        if copied is None:
            copied = tensor.detach().clone()
        return copied.requires_grad_(tensor.requires_grad)

    def _copy_with_storage(self, tensor):
        """Copy `tensor` and keep the memory it shares with other inputs shared; None if that is not possible."""
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        if tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            return None
        storage = tensor.untyped_storage()
        if storage.nbytes() > _LARGEST_STORAGE * tensor.nbytes:
            return None
        key = storage._cdata
        if key not in self._storages:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._storages[key] = whole.clone()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            self._storages[key].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )


def _tuple_like(value: tuple, items: list) -> tuple:
    try:
        return tuple.__new__(type(value), items)  # also works for named tuples
    except TypeError:
        return type(value)(items)  # torch.return_types


def _copy_iterator(value):
    if isinstance(value, itertools.count):
        return fresh_counter(value)
    try:
        return copy.copy(value)
    except TypeError:
        raise TypeError(
            f"SAM computes each micro-batch twice, but its inputs contain a {type(value).__name__}, which can be read "
            "only once. Put a list of its items into the micro-batch instead."
        ) from None
