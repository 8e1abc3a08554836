"""Capture the contents of tensors that a forward pass changes. Tensors that do not change are not copied."""

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Tensors up to this size are always copied; this is cheaper than a check whether they change.
_SMALL_BYTES = 1 << 16
# Larger tensors are copied once to see whether they change, up to this total size (or the caller's budget).
_COPY_BUDGET_BYTES = 64 << 20
# Number of elements that are compared of tensors beyond the budget.
_SAMPLES = 256


@dataclass
class TensorState:
    """The content of a tensor at the time of its capture.

    Attributes:
        tensor (`torch.Tensor`): the tensor.
        alias (`torch.Tensor`): a view of the storage at that time, which keeps the storage alive.
        version (`int`): autograd version counter at that time.
        copy (`torch.Tensor` or `None`): a copy of the content.
        sample (`torch.Tensor` or `None`): some of the elements, if there was no budget for a copy.
    """

    tensor: torch.Tensor
    alias: torch.Tensor
    version: int
    copy: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    def changed(self) -> bool:
        """Whether the tensor was replaced or, according to its version counter, written to since the capture."""
        return self.swapped() or self.tensor._version != self.version

    def swapped(self) -> bool:
        """Whether the storage or the shape of the tensor changed since the capture."""
        tensor, alias = self.tensor, self.alias
        return tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the original storage and its content."""
        if self.swapped():
            self.tensor.data = self.alias
        if self.copy is not None:
            self.alias.copy_(self.copy)


class TensorContents:
    """Captures the contents of tensors, and detects in the first step which of them change.

    Args:
        copy_budget (`int`): bytes of copies that the first step may hold to detect changes.
    """

    def __init__(self, copy_budget: int = _COPY_BUDGET_BYTES):
        self._copy_budget = max(copy_budget, _COPY_BUDGET_BYTES)
        self._changes = WeakIdKeyDictionary()  # tensor -> whether a forward pass changes it
        self._versions = WeakIdKeyDictionary()  # unchanged tensor -> its version
        self._watched = WeakIdKeyDictionary()  # tensor that may or may not change -> its states, in order
        self._lost: list[torch.Tensor] = []  # changed without a copy

    def capture(self, tensor: torch.Tensor, *, always: bool = False) -> TensorState | None:
        """Capture the content of `tensor`; `None` if the tensor does not change or cannot be written to.

        Args:
            tensor (`torch.Tensor`): a tensor that is not part of an autograd graph.
            always (`bool`): copy it regardless of its size.
        """
        changes = self._changes.get(tensor)
        if changes is False and not always and not self._changed_later(tensor):
            return None
        if not _is_writable(tensor):
            return None
        state = TensorState(tensor, tensor.detach(), tensor._version)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if always or changes is not None or (tensor.nbytes <= _SMALL_BYTES and not is_parameter):
            state.copy = state.alias.clone()
        elif is_parameter and not (tensor.is_floating_point() or tensor.is_complex()):
            self._record(tensor, changed=False)  # packed weights of a quantized model
        else:
            self._watch(state)
        return state

    def _record(self, tensor: torch.Tensor, changed: bool) -> None:
        self._changes[tensor] = changed
        # Frozen parameters are usually updated by `.data.mul_()`, which does not change the version counter.
        if not changed and not isinstance(tensor, torch.nn.Parameter):
            self._versions[tensor] = tensor._version

    def _changed_later(self, tensor: torch.Tensor) -> bool:
        version = self._versions.get(tensor)
        if version is None or tensor.is_inference() or version == tensor._version:
            return False
        self._record(tensor, changed=True)
        self._lost.append(tensor)
        return True

    def _watch(self, state: TensorState) -> None:
        """Keep a copy or a sample of a tensor that may or may not change."""
        tensor = state.tensor
        states = self._watched.setdefault(tensor, [])
        if states:
            if _has_changed(states[-1]):
                self._mark_changed(tensor, states)
                state.copy = state.alias.clone()
                return
            state.copy, state.sample = states[-1].copy, states[-1].sample
        elif tensor.nbytes <= self._copy_budget:
            self._copy_budget -= tensor.nbytes
            state.copy = state.alias.clone()
        else:
            state.sample = _sample(state.alias).clone()
        states.append(state)

    def _mark_changed(self, tensor: torch.Tensor, states: list[TensorState]) -> None:
        """Record that the tensor changed after the last of these states was captured."""
        del self._watched[tensor]
        self._record(tensor, changed=True)
        if states[-1].copy is None:
            self._lost.append(tensor)

    @torch.no_grad()
    def find_changed(self) -> list[torch.Tensor]:
        """Detect which tensors have changed since the last call.

        Waits for the device only if there are new tensors, i.e. in the first step.

        Returns:
            `list[torch.Tensor]`: tensors that changed and whose previous content was not copied.
        """
        for tensor, states in list(self._watched.items()):
            if _has_changed(states[-1]):
                self._mark_changed(tensor, states)
                continue
            del self._watched[tensor]
            self._record(tensor, changed=False)
            for state in states:
                state.copy = None
        lost, self._lost = self._lost, []
        return lost


def _has_changed(state: TensorState) -> bool:
    return state.changed() or bool(_content_differs(state))


def _content_differs(state: TensorState) -> torch.Tensor:
    """Whether the content has changed; bool, shape `()`."""
    now = state.tensor.detach()
    if state.copy is not None:
        return (now != state.copy).any()
    return (_sample(now) != state.sample).any()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _is_writable(tensor: torch.Tensor) -> bool:
    if tensor.is_inference() or tensor.is_meta or tensor.layout != torch.strided:
        return False
    # Tensor subclasses (quantized weights, shards) store their content elsewhere; expanded tensors are not writable.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return False
    return all(stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
