"""The state of a training loop: all that a pass reads or changes, besides the trained weights.

The ascent pass captures it before each micro-batch and at its end. The descent pass restores the captured state for
each micro-batch, and finally the state at the end of the ascent pass, which is the state after plain training.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.logging import get_logger

from .modules import ModuleStates, add_module, frozen_parameters
from .random_streams import RandomState, is_generator
from .reach import reach, reach_class
from .snapshot import Snapshot
from .tensors import TensorContents

logger = get_logger(__name__)


class CapturedState:
    """The state of a loop at one time."""

    def __init__(self, random_state: RandomState, snapshot: Snapshot):
        self._random_state = random_state
        self._snapshot = snapshot

    def restore(self, end: bool = True) -> None:
        """Restore the captured state; see [`Snapshot.restore`]."""
        self._snapshot.restore(end)
        self._random_state.restore()


class LoopState:
    """The state that the passes of a step change: random states, modules, and objects of the training loop.

    Modules, tensors and random generators that the function of the loop refers to, or its object holds, are found
    automatically.

    Args:
        model (`torch.nn.Module`): the model that the loop calls.
    """

    def __init__(self, model: torch.nn.Module):
        self._inside = {id(part) for part in model.modules()}
        self._reached: list[tuple[str, Any]] = []
        self._warned = False
        self._flag_directions: dict = {}
        self._find_reachable([])

    def bind(self, backend) -> None:
        """Set the [`~hf_sam.step.backends.Backend`], which knows the models, their devices and engine attributes."""
        self._backend = backend
        self._tensors = TensorContents(backend.copy_budget())

    def begin_step(self, functions: list[Callable]) -> None:
        """Find the state that the passes of the next step can change. Called for each step, as objects may be replaced.

        Args:
            functions (`list[Callable]`): functions that compute the micro-batches.
        """
        parts = [part for model in self._backend.models for part in model.modules()]
        own = list(self._backend.model.modules()) if len(self._backend.models) > 1 else parts
        self._inside = {id(part) for part in own}
        self._find_reachable(functions, {type(part) for part in own})
        outside = [part for module in self.outside_modules() for part in module.modules()]
        whole = [*(parts if self._backend.keeps_frozen_parameters() else ()), *outside]
        self._modules = ModuleStates(
            [*parts, *outside], frozen_parameters(whole), self._backend.is_engine_attribute, self._flag_directions
        )

    def _find_reachable(self, functions: list[Callable], classes: Iterable[type] = ()) -> None:
        found = [*self.reachable(functions), *(pair for cls in classes for pair in reach_class(cls))]
        unique = {id(value): (name, value) for name, value in reversed(found) if id(value) not in self._inside}
        self._reached = list(unique.values())

    def reachable(self, functions: list[Callable]) -> list[tuple[str, Any]]:
        """Modules, tensors and random generators that the functions can reach, each with its path."""
        return [pair for function in {id(f): f for f in functions}.values() for pair in reach(function)]

    def outside_modules(self) -> list[torch.nn.Module]:
        """Modules outside of the model that the loop can reach."""
        return [value for _, value in self._reached if isinstance(value, torch.nn.Module)]

    def outside_parameters(self, inside: set[int]) -> dict[str, torch.Tensor]:
        """Trainable tensors outside of the models that the loop can reach, by name.

        Args:
            inside (`set[int]`): ids (`id(param)`) of the parameters of the models.
        """
        return parameters_reached(self._reached, inside)

    def capture(self) -> CapturedState:
        """Capture the current state."""
        snapshot = Snapshot(self._tensors, add_module)
        self._modules.add_to(snapshot)
        for _, value in self._reached:
            if is_generator(value) or (isinstance(value, torch.Tensor) and not value.requires_grad):
                snapshot.add(value)
        self.add_records(snapshot)
        return CapturedState(RandomState.capture(self._backend.devices), snapshot)

    def add_records(self, snapshot: Snapshot) -> None:
        """Add the records that the loop writes during a pass to the snapshot."""

    def end_step(self) -> None:
        """Called after the descent pass."""

    def end_ascent(self) -> None:
        """Called after the ascent pass: detects which tensors a forward pass changes."""
        lost = self._tensors.find_changed()
        if lost and not self._warned:
            self._warned = True
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in lost[:3])
            logger.warning(
                f"A forward pass changed {len(lost)} tensors that are not trained and were too large to be copied "
                f"beforehand (shapes {shapes}), so the two passes of this SAM step started from different states. From "
                "now on they are copied. Keep state that a forward pass updates in buffers, or update it after the "
                "optimizer step."
            )


def parameters_reached(found: list[tuple[str, Any]], inside: set[int]) -> dict[str, torch.Tensor]:
    """Trainable tensors among objects found by [`reach`], including the parameters of modules, by name.

    Args:
        found (`list[tuple[str, Any]]`): paths and objects.
        inside (`set[int]`): ids (`id(param)`) of the parameters to leave out.
    """
    outside = {}
    for name, value in found:
        if isinstance(value, torch.nn.Module):
            pairs = ((f"{name}.{part}" if name else part, param) for part, param in value.named_parameters())
        elif isinstance(value, torch.Tensor) and value.is_leaf:
            pairs = ((name, value),)
        else:
            continue
        outside.update((name, param) for name, param in pairs if param.requires_grad and id(param) not in inside)
    return outside
