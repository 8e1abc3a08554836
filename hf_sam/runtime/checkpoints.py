"""Checkpoints of a Trainer: which of them are complete, and where in the data they were taken.

The host writes `trainer_state.json` last. [`CheckpointRecord`] adds to it what is needed to resume: the number of
processes, each of which writes a file of its own, and the position in the data.
"""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .distributed import broadcast
from .run_record import read_json


class CheckpointRecord(TrainerCallback, ExportableState):
    """Writes the number of processes and the position in the data into each checkpoint.

    Args:
        world_size (`int`): number of processes.
        position (`Callable[[], dict]`, *optional*): returns the position in the data, for JSON.
    """

    def __init__(self, world_size: int, position: Callable[[], dict] | None = None):
        self._world_size, self._position = world_size, position

    def on_train_begin(self, args, state, control, **kwargs):
        # The checkpoint that a run begins with may be from a trainer without this callback.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict:
        """What the host writes into `trainer_state.json`."""
        data = self._position() if self._position is not None else None
        return {"args": {}, "attributes": {"world_size": self._world_size, "data": data}}


def read_record(checkpoint: str | Path) -> dict | None:
    """What [`CheckpointRecord`] wrote: `world_size` and `data`; None if it wrote nothing."""
    state = read_json(Path(checkpoint) / "trainer_state.json") or {}
    stored = state.get("stateful_callbacks", {}).get(CheckpointRecord.__name__)
    if isinstance(stored, list):
        stored = stored[-1]
    return None if stored is None else stored["attributes"]


def last_complete(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in a folder, or None; the same on all processes.

    A checkpoint that was interrupted lacks its last file, or the file of a process. The files of all processes must be
    visible, so checkpoints have to be on a disk that all nodes share.
    """
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_complete(folder):
            steps[int(step)] = str(folder)
    return broadcast(steps[max(steps)] if steps else None)


def _is_complete(folder: Path) -> bool:
    record = read_record(folder)
    if record is None:
        return False
    world = record["world_size"]
    names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    return all((folder / name).exists() for name in names)
