"""Computing a micro-batch a second time without leaving a trace of it.

The descent pass must see the dropout masks of the ascent pass, and state that a forward pass advances (BatchNorm
statistics, counters in buffers) must advance once a step, as in plain training.
"""

import contextlib
import random
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """State of every global random stream that a forward pass may draw from."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: dict[torch.device, torch.Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RandomState":
        """State of the streams of Python, NumPy, torch on the CPU and torch on `devices`; waits for none of them."""
        accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.get_rng_state(),
            devices={device: torch.get_device_module(device).get_rng_state(device) for device in accelerators},
        )

    def restore(self) -> None:
        """Put all streams back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class BufferState:
    """Learns in the ascent pass which buffers a forward pass changes, and keeps replays from changing them again.

    Only those buffers are ever copied: a quantized model keeps its weights in buffers, which no forward pass changes.
    """

    def __init__(self):
        self._changing: set[str] = set()

    @contextlib.contextmanager
    def observed(self, model: torch.nn.Module):
        """Around a micro-batch of the ascent pass."""
        before = {name: (buffer, _version(buffer)) for name, _, _, buffer in _buffers(model)}
        yield
        for name, module, _, buffer in _buffers(model):
            old, version = before.get(name, (None, None))
            # Kernels may write running statistics without counting a version up; modules that keep some are known.
            if buffer is not old or _version(buffer) != version or getattr(module, "track_running_stats", False):
                self._changing.add(name)

    @contextlib.contextmanager
    def preserved(self, model: torch.nn.Module):
        """Around a micro-batch that is computed a second time."""
        kept = [
            (module, key, buffer, buffer.detach().clone())
            for name, module, key, buffer in _buffers(model)
            if name in self._changing
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, key, buffer, value in kept:
                    buffer.copy_(value)
                    module._buffers[key] = buffer


def _buffers(model: torch.nn.Module):
    """Full name, owner, name there, and value of every buffer."""
    for module_name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            yield f"{module_name}.{key}", module, key, buffer


def _version(buffer: torch.Tensor) -> int | None:
    # Inference tensors have no version, and cannot be changed in place either.
    return None if buffer.is_inference() else buffer._version


@contextlib.contextmanager
def recorded_once(owner: Any, names: Iterable[str], replayed: bool):
    """Keep what a forward pass at the perturbed weights records on `owner` as plain training would leave it.

    Args:
        owner (`Any`): object whose attributes a forward pass writes to.
        names (`Iterable[str]`): those attributes, as far as `owner` has them: numbers that are counted up, lists that
            are appended to, tensors, and (nested) dicts of these.
        replayed (`bool`): `True` puts all of them back, because the same micro-batch was recorded before. `False` lets
            counters advance, but takes appended values back, which belong to the perturbed weights.
    """
    records = [(name, _Record(getattr(owner, name))) for name in names if hasattr(owner, name)]
    try:
        yield
    finally:
        for name, record in records:
            setattr(owner, name, record.undo(getattr(owner, name), replayed))


class _Record:
    """A value as it was, without copying the lists in it, which may be long."""

    def __init__(self, value: Any):
        self.value = value.clone() if isinstance(value, torch.Tensor) else value
        if isinstance(value, MutableMapping):
            self.items = {key: _Record(item) for key, item in value.items()}
        elif isinstance(value, list):
            self.length = len(value)

    def undo(self, now: Any, everything: bool) -> Any:
        """What `now` should be instead."""
        if isinstance(self.value, list):
            del self.value[self.length :]
            # A list that was replaced holds a state (a total), not another sample.
            return self.value if everything or now is self.value else now
        if isinstance(self.value, MutableMapping) and now is self.value:
            for key in [key for key in now if key not in self.items]:
                del now[key]
            for key, record in self.items.items():
                now[key] = record.undo(now[key], everything) if key in now else record.value
            return now
        return self.value if everything else now
