"""Random states that a forward pass may use: the global ones, and those of random generator objects."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Functions that get and set the state of a generator, by type.
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
    """The global random states that a forward pass may use.

    Attributes:
        python (`Any`): state of `random`.
        numpy (`Any`): state of `np.random`.
        cpu (`torch.Tensor`): state of torch on the CPU.
        devices (`dict[torch.device, torch.Tensor]`): state of torch on each accelerator.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: dict[torch.device, torch.Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RandomState":
        """Capture the random states of Python, NumPy, torch on the CPU and torch on `devices`, without waiting."""
        accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.get_rng_state(),
            devices={device: torch.get_device_module(device).get_rng_state(device) for device in accelerators},
        )

    def restore(self) -> None:
        """Restore all global random states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator of torch, NumPy or Python."""
    return isinstance(value, tuple(_GENERATORS))


def generator_state(generator: Any) -> Any:
    """The state of a random generator, for [`set_generator_state`]."""
    return _accessors(generator)[0](generator)


def set_generator_state(generator: Any, state: Any) -> None:
    """Set the state of a random generator to a result of [`generator_state`]."""
    _accessors(generator)[1](generator, state)


def _accessors(generator):
    return next(pair for kind, pair in _GENERATORS.items() if isinstance(generator, kind))
