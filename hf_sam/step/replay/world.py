"""Everything besides the trained weights that a pass reads and changes, so that both passes start from the same.

The ascent pass captures it before each micro-batch and at its end. The descent pass gives each micro-batch the state
that it had in the ascent pass, and afterwards everything is as the ascent pass, which is plain training's, left it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.logging import get_logger

from .modules import ModuleStates, add_tree, frozen_parameters
from .random_streams import RandomState, is_generator
from .reach import reach, reach_class
from .snapshot import Snapshot
from .tensors import TensorContents

logger = get_logger(__name__)


class WorldState:
    """The world at one time."""

    def __init__(self, random_state: RandomState, snapshot: Snapshot):
        self._random_state = random_state
        self._snapshot = snapshot

    def restore(self, end: bool = True) -> None:
        """Make the world what it was; see [`Snapshot.restore`]."""
        self._snapshot.restore(end)
        self._random_state.restore()


class World:
    """What the passes of a step change: random streams, modules, and what the loop's own function reaches.

    Modules, tensors and random generators that the function names, or that its object holds, are found by themselves.

    Args:
        model (`torch.nn.Module`): the model as the loop calls it.
    """

    def __init__(self, model: torch.nn.Module):
        self._inside = {id(part) for part in model.modules()}
        self._found: list[tuple[str, Any]] = []
        self._warned = False
        self._switches: dict = {}
        self._look([])

    def bind(self, backend) -> None:
        """Say which [`~hf_sam.step.backends.Backend`] knows the models, their devices, and what in them is its own."""
        self._backend = backend
        self._tensors = TensorContents(backend.room_for_copies())

    def begin_step(self, functions: list[Callable]) -> None:
        """Look for what the passes of the coming step can change; objects may have been replaced since the last one.

        Args:
            functions (`list[Callable]`): what the loop computes its micro-batches with.
        """
        parts = [part for model in self._backend.models for part in model.modules()]
        own = list(self._backend.model.modules()) if len(self._backend.models) > 1 else parts
        self._inside = {id(part) for part in own}
        self._look(functions, {type(part) for part in own})
        outside = [part for module in self.companions() for part in module.modules()]
        whole = [*(parts if self._backend.keeps_frozen_parameters() else ()), *outside]
        self._modules = ModuleStates(
            [*parts, *outside], frozen_parameters(whole), self._backend.is_own_attribute, self._switches
        )

    def _look(self, functions: list[Callable], classes: Iterable[type] = ()) -> None:
        found = [*self.found(functions), *(pair for cls in classes for pair in reach_class(cls))]
        unique = {id(value): (name, value) for name, value in reversed(found) if id(value) not in self._inside}
        self._found = list(unique.values())

    def found(self, functions: list[Callable]) -> list[tuple[str, Any]]:
        """Modules, tensors and random generators that the functions reach, and where."""
        return [pair for function in {id(f): f for f in functions}.values() for pair in reach(function)]

    def companions(self) -> list[torch.nn.Module]:
        """Modules that the loop reaches outside of the model."""
        return [value for _, value in self._found if isinstance(value, torch.nn.Module)]

    def outside_parameters(self, inside: set[int]) -> dict[str, torch.Tensor]:
        """Trainable tensors that the loop reaches outside of the models, by name.

        Args:
            inside (`set[int]`): identities of the parameters of the models.
        """
        return parameters_reached(self._found, inside)

    def capture(self) -> WorldState:
        """The world now."""
        snapshot = Snapshot(self._tensors, add_tree)
        self._modules.add_to(snapshot)
        for _, value in self._found:
            if is_generator(value) or (isinstance(value, torch.Tensor) and not value.requires_grad):
                snapshot.add(value)
        self.add_records(snapshot)
        return WorldState(RandomState.capture(self._backend.devices), snapshot)

    def add_records(self, snapshot: Snapshot) -> None:
        """Capture what the loop itself writes down in a pass."""

    def end_step(self) -> None:
        """After the descent pass."""

    def learn(self) -> None:
        """After the ascent pass: which tensors does a forward pass change?"""
        lost = self._tensors.learn()
        if lost and not self._warned:
            self._warned = True
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in lost[:3])
            logger.warning(
                f"A forward pass changed {len(lost)} tensors that are not trained and were too large to be copied "
                f"beforehand (shapes {shapes}), so the two passes of this one SAM step did not see the same. From now "
                "on they are copied. Keep what a forward pass updates in buffers, or update it after the optimizer "
                "step."
            )


def parameters_reached(found: list[tuple[str, Any]], inside: set[int]) -> dict[str, torch.Tensor]:
    """Trainable tensors among modules and tensors that were found, by name.

    Args:
        found (`list[tuple[str, Any]]`): where each was found, and what.
        inside (`set[int]`): identities of those to leave out.
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
