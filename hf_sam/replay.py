"""Computing a micro-batch a second time without leaving a trace of it.

The descent pass must see the dropout masks of the ascent pass, and state that a forward pass advances (BatchNorm
statistics, counters in buffers) must advance once a step, as in plain training.
"""

import contextlib
import random
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
    device: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """State of the streams of Python, NumPy, torch on the CPU and torch on `device`; costs no device sync."""
        streams = _device_streams(device)
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.get_rng_state(),
            device=streams.get_rng_state() if streams is not None else None,
        )

    def restore(self, device: torch.device) -> None:
        """Put all streams back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            _device_streams(device).set_rng_state(self.device)


def _device_streams(device: torch.device):
    return None if device.type == "cpu" else torch.get_device_module(device)


@contextlib.contextmanager
def buffers_preserved(model: torch.nn.Module):
    """Put the model's buffers back to their values at entry, whatever the forward passes inside do to them."""
    buffers = list(model.buffers())
    copies = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
