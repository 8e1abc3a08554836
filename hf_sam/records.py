"""Records that a trainer keeps while it computes a loss, such as metrics. The second pass must not change them."""

import contextlib
import difflib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.logging import get_logger

from .step.replay import LoopState, Snapshot, reach, reach_class
from .step.replay.kinds import IMMUTABLE_TYPES, attributes
from .step.replay.modules import add_module
from .step.replay.tensors import TensorContents

logger = get_logger(__name__)

# Attributes of `Trainer` itself, which are neither records nor random generators of a loss.
_HOST_ATTRIBUTES = frozenset(
    {
        *("model", "model_wrapped", "accelerator", "optimizer", "lr_scheduler", "callback_handler", "state", "control"),
        *(
            "args",
            "train_dataset",
            "eval_dataset",
            "processing_class",
            "current_gradient_accumulation_steps",
            "_tr_loss",
        ),
    }
)


class TrainerLoopState(LoopState):
    """The [`LoopState`] of a trainer, which includes the objects in its attributes, and its records.

    Args:
        model (`torch.nn.Module`): see [`LoopState`].
        trainer (`transformers.Trainer`): the trainer whose `compute_loss` runs in both passes.
        recorded (`tuple[str, ...]`): names of the attributes of the trainer that are records.
        known (`frozenset[str]`): names in `recorded` that the trainer need not have.
    """

    def __init__(self, model: torch.nn.Module, trainer, recorded: tuple[str, ...], known: frozenset[str]):
        self._trainer = trainer
        self._recorded = recorded
        self._known = known
        self._watched: dict[str, Any] | None = {}
        super().__init__(model)

    def reachable(self, functions: list[Callable]) -> list[tuple[str, Any]]:
        return reachable_from_trainer(self._trainer)

    def add_records(self, snapshot: Snapshot) -> None:
        add_records(self._trainer, self._recorded, snapshot)

    def end_ascent(self) -> None:
        super().end_ascent()
        for name in self._recorded:
            if name not in self._known and not hasattr(self._trainer, name):
                near = difflib.get_close_matches(name, vars(self._trainer), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"sam_recorded names {name!r}, which {type(self._trainer).__name__} does not have after a "
                    f"pass.{hint}"
                )
        if self._watched is not None:
            self._watched = self._fingerprints()

    def end_step(self) -> None:
        if self._watched is None:
            return
        before, self._watched = self._watched, None
        changed = [name for name, value in self._fingerprints().items() if before.get(name) != value]
        if changed:
            logger.warning(
                f"The second pass of SAM changed {', '.join(changed)} of {type(self._trainer).__name__}, which may now "
                "count each micro-batch twice. If these are records of compute_loss, add them to sam_recorded: "
                f"sam_recorded = (*SAMMixin.sam_recorded, {', '.join(map(repr, changed))})."
            )

    def _fingerprints(self) -> dict[str, Any]:
        """A value for each attribute that is not a record, which changes if the attribute changes."""
        return {
            name: _fingerprint(value)
            for name, value in vars(self._trainer).items()
            if name not in _HOST_ATTRIBUTES and name not in self._recorded and not name.startswith("_sam")
        }


def reachable_from_trainer(trainer) -> list[tuple[str, Any]]:
    """Modules, tensors and random generators in attributes of a trainer, or used by its methods, with their paths."""
    found = []
    for name, value in vars(trainer).items():
        if name not in _HOST_ATTRIBUTES and not name.startswith("_sam"):
            found += [(f"{name}.{part}" if part else name, item) for part, item in reach(value)]
    # Searched here, because `reach` does not search objects of transformers and TRL.
    collator = attributes(getattr(trainer, "data_collator", None)) or {}
    return [*found, *reach(collator), *reach_class(type(trainer))]


def _fingerprint(value: Any) -> Any:
    if type(value) in IMMUTABLE_TYPES:
        return value if isinstance(value, int | float | str) else id(value)
    if isinstance(value, list | dict | set | deque):
        return id(value), len(value)
    return id(value)


def add_records(owner: Any, names: tuple[str, ...], snapshot: Snapshot) -> None:
    """Capture attributes of `owner` by name.

    Raises:
        ValueError: if the state of an attribute cannot be restored; the message names the remedy.
    """
    present = {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    for name, value in present.items():
        if not snapshot.add(value, explicit=True):
            raise ValueError(
                f"sam_recorded names {name!r}, a {type(value).__name__}, whose state cannot be restored after the "
                "second pass of SAM. Use numbers, containers, arrays, tensors, modules, or objects with attributes "
                f"instead, or override sam_perturbed_context of {type(owner).__name__}."
            )
    snapshot.add_namespace(owner, present)
    absent = [name for name in names if name not in present]

    def remove_new(end: bool):
        for name in absent:
            vars(owner).pop(name, None)

    snapshot.on_restore(remove_new)


@contextlib.contextmanager
def discard_appended(owner: Any, names: tuple[str, ...]) -> Iterator[None]:
    """Context around a micro-batch that is computed only at the perturbed weights.

    Counters of `owner` advance, but values appended to its records are removed, because they belong to the perturbed
    weights.
    """
    snapshot = Snapshot(TensorContents(), add_module)
    add_records(owner, names, snapshot)
    try:
        yield
    finally:
        snapshot.remove_added()
