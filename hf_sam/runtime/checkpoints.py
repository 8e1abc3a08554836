"""Find the last complete checkpoint of a `Trainer`, and the data position at which it was saved.

`Trainer` writes `trainer_state.json` last. [`CheckpointRecord`] adds two entries that a resumed run needs: the number
of processes (each one saves its own random states) and the position in the data.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .disk import read_json
from .distributed import broadcast


class CheckpointRecord(TrainerCallback, ExportableState):
    """Writes the number of processes and the position in the data into each checkpoint.

    Args:
        world_size (`int`): number of processes.
        position (`Callable[[], dict]`, *optional*): returns the position in the data as plain JSON values.
    """

    def __init__(self, world_size: int, position: Callable[[], dict] | None = None):
        self._world_size, self._position = world_size, position

    def on_train_begin(self, args, state, control, **kwargs):
        # The run may resume from a checkpoint of a trainer without this callback.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict:
        """The entries that `Trainer` writes into `trainer_state.json`."""
        data = self._position() if self._position is not None else None
        return {"args": {}, "attributes": {"world_size": self._world_size, "data": data}}


def read_record(checkpoint: str | Path) -> dict | None:
    """Read the entries of [`CheckpointRecord`], `world_size` and `data`; None if the checkpoint has none."""
    state = read_json(Path(checkpoint) / "trainer_state.json") or {}
    stored = state.get("stateful_callbacks", {}).get(CheckpointRecord.__name__)
    if isinstance(stored, list):
        stored = stored[-1]
    return None if stored is None else stored["attributes"]


def last_complete(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint in a folder, or None; the same on all processes.

    A checkpoint is complete if it has its last file and one file of each process. All nodes must therefore save to a
    shared disk.
    """
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_complete(folder):
            steps[int(step)] = str(folder)
    return broadcast(steps[max(steps)] if steps else None)


def complete(checkpoint: str | Path) -> str | None:
    """Return the folder of a checkpoint if it is complete, or None; the same on all processes."""
    return broadcast(str(checkpoint) if _is_complete(Path(checkpoint)) else None)


def _is_complete(folder: Path) -> bool:
    record = read_record(folder)
    if record is None:
        return False
    world = record["world_size"]
    names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    # Ranks do not wait for each other, so one may have been killed while it wrote its file, a zip archive.
    return all(zipfile.is_zipfile(folder / name) for name in names)
