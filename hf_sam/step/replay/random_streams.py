"""The random streams that a forward pass may draw from: the global ones, and generators of one's own."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# How the state of a generator of one's own is read and written.
_GENERATORS = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
}


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


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator of torch, NumPy or Python."""
    return isinstance(value, tuple(_GENERATORS))


def generator_state(generator: Any) -> Any:
    """The state of a random generator, to be given to [`set_generator_state`]."""
    return _accessors(generator)[0](generator)


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a random generator back to a state that [`generator_state`] gave."""
    _accessors(generator)[1](generator, state)


def _accessors(generator):
    return next(pair for kind, pair in _GENERATORS.items() if isinstance(generator, kind))
