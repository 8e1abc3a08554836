"""Computing a micro-batch a second time without leaving a trace of it.

The descent pass must see the dropout masks of the ascent pass, and state that a forward pass advances (BatchNorm
statistics, counters in buffers) must advance once a step, as in plain training.
"""

import contextlib
import random
from collections.abc import Iterable
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
        before = _versions(model)
        yield
        after = _versions(model)
        # Kernels may write running statistics without counting a version up; modules that keep some are known.
        self._changing |= {name for name in after if after[name] != before.get(name)} | _running_statistics(model)

    @contextlib.contextmanager
    def preserved(self, model: torch.nn.Module):
        """Around a micro-batch that is computed a second time."""
        copies = [(buffer, buffer.detach().clone()) for name, buffer in model.named_buffers() if name in self._changing]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, copy in copies:
                    buffer.copy_(copy)


def _versions(model: torch.nn.Module) -> dict[str, int]:
    # Inference tensors have no version, and cannot be changed in place either.
    return {name: buffer._version for name, buffer in model.named_buffers() if not buffer.is_inference()}


def _running_statistics(model: torch.nn.Module) -> set[str]:
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for name, _ in module.named_buffers(recurse=False)
    }
