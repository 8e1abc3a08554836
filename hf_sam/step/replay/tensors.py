"""Contents of tensors that a forward pass may change: copied only where it does."""

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Tensors up to this size are copied every time; it costs less than to find out whether they change.
_SMALL_BYTES = 1 << 16
# Larger ones are copied once, to see whether they change, as far as they fit in here (or in the caller's own room).
_ROOM_BYTES = 64 << 20
# Of those that do not fit, so many elements are compared.
_SAMPLES = 256


@dataclass
class TensorState:
    """Content of one tensor at one time.

    Attributes:
        tensor (`torch.Tensor`): the tensor itself.
        alias (`torch.Tensor`): another tensor on the storage that it had, which keeps that storage alive.
        version (`int`): its version at the time.
        copy (`torch.Tensor` or `None`): a copy of its content.
        sample (`torch.Tensor` or `None`): some of its elements, where there was no room for a copy.
    """

    tensor: torch.Tensor
    alias: torch.Tensor
    version: int
    copy: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    def changed(self) -> bool:
        """Whether the tensor was replaced or written to since, as far as its version tells."""
        return self.swapped() or self.tensor._version != self.version

    def swapped(self) -> bool:
        """Whether the tensor has another storage or another shape than it had."""
        tensor, alias = self.tensor, self.alias
        return tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape

    @torch.no_grad()
    def restore(self) -> None:
        """Put the content back, into the storage that the tensor had."""
        if self.swapped():
            self.tensor.data = self.alias
        if self.copy is not None:
            self.alias.copy_(self.copy)


class TensorContents:
    """Captures contents of tensors, and learns in the first step which of them change.

    Args:
        room (`int`): bytes of copies that the first step may hold of tensors that may turn out not to change.
    """

    def __init__(self, room: int = _ROOM_BYTES):
        self._room = max(room, _ROOM_BYTES)
        self._changes = WeakIdKeyDictionary()  # tensor -> whether a forward pass changes it
        self._versions = WeakIdKeyDictionary()  # those that did not change -> their version
        self._unknown = WeakIdKeyDictionary()  # those that are being found out about -> their states, in order
        self._lost: list[torch.Tensor] = []

    def capture(self, tensor: torch.Tensor, *, always: bool = False) -> TensorState | None:
        """The content of `tensor` now; `None` for one that does not change or cannot be written to.

        Args:
            tensor (`torch.Tensor`): any tensor that is not part of an autograd graph.
            always (`bool`): whether to copy it whatever its size.
        """
        changes = self._changes.get(tensor)
        if changes is False and not always and not self._written_after_all(tensor):
            return None
        if not _is_writable(tensor):
            return None
        state = TensorState(tensor, tensor.detach(), tensor._version)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if always or changes is not None or (tensor.nbytes <= _SMALL_BYTES and not is_parameter):
            state.copy = state.alias.clone()
        elif is_parameter and not (tensor.is_floating_point() or tensor.is_complex()):
            self._settle(tensor, changed=False)  # packed weights of a quantized model
        else:
            self._look_at(state)
        return state

    def _settle(self, tensor: torch.Tensor, changed: bool) -> None:
        self._changes[tensor] = changed
        # Usual updates of frozen parameters, `.data.mul_()`, do not count the version up, so there is nothing to watch.
        if not changed and not isinstance(tensor, torch.nn.Parameter):
            self._versions[tensor] = tensor._version

    def _written_after_all(self, tensor: torch.Tensor) -> bool:
        version = self._versions.get(tensor)
        if version is None or tensor.is_inference() or version == tensor._version:
            return False
        self._settle(tensor, changed=True)
        self._lost.append(tensor)
        return True

    def _look_at(self, state: TensorState) -> None:
        """Keep what shows whether the tensor changes, as long as that is not known."""
        tensor = state.tensor
        states = self._unknown.setdefault(tensor, [])
        if states:
            if _changed(states[-1]):
                self._found_out(tensor, states)
                state.copy = state.alias.clone()
                return
            state.copy, state.sample = states[-1].copy, states[-1].sample
        elif tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            state.copy = state.alias.clone()
        else:
            state.sample = _sampled(state.alias).clone()
        states.append(state)

    def _found_out(self, tensor: torch.Tensor, states: list[TensorState]) -> None:
        """The tensor changed after the last of these states was captured."""
        del self._unknown[tensor]
        self._settle(tensor, changed=True)
        if states[-1].copy is None:
            self._lost.append(tensor)

    @torch.no_grad()
    def learn(self) -> list[torch.Tensor]:
        """Find out which tensors the passes since the last call have changed.

        Waits for the device, but only if there were tensors not known before: in the first step.

        Returns:
            `list[torch.Tensor]`: those that changed without a copy of what they were.
        """
        for tensor, states in list(self._unknown.items()):
            if _changed(states[-1]):
                self._found_out(tensor, states)
                continue
            del self._unknown[tensor]
            self._settle(tensor, changed=False)
            for state in states:
                state.copy = None
        lost, self._lost = self._lost, []
        return lost


def _changed(state: TensorState) -> bool:
    return state.changed() or bool(_differs(state))


def _differs(state: TensorState) -> torch.Tensor:
    """Whether the content is another one now; bool, shape `()`."""
    now = state.tensor.detach()
    if state.copy is not None:
        return (now != state.copy).any()
    return (_sampled(now) != state.sample).any()


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _is_writable(tensor: torch.Tensor) -> bool:
    if tensor.is_inference() or tensor.is_meta or tensor.layout != torch.strided:
        return False
    # Tensor subclasses (quantized weights, shards) keep their content elsewhere; expanded ones refuse to be written to.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return False
    return all(stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
