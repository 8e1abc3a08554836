"""Checkpoints that a run can go on from, also one that was killed while it wrote the next."""

import json
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

_POSITION = "DataPosition"


class DataPosition(TrainerCallback, ExportableState):
    """Writes the place in the data into `trainer_state.json`, the last file of a checkpoint.

    Args:
        position (`Callable[[], dict]`): tells where the data stands.
    """

    def __init__(self, position):
        self._position = position

    def state(self) -> dict:
        """What the host writes."""
        return {"args": {}, "attributes": self._position()}


def read_position(checkpoint: str | Path) -> dict | None:
    """The place in the data that a checkpoint holds; None if it holds none."""
    state = _read(Path(checkpoint))
    stored = (state or {}).get("stateful_callbacks", {}).get(_POSITION)
    if isinstance(stored, list):
        stored = stored[-1]
    return None if stored is None else stored["attributes"]


def last_complete(output_dir: str | Path, world_size: int = 1) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None.

    Args:
        output_dir (`str` or `Path`): of the run.
        world_size (`int`): number of processes, each of which writes a file of its own.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_complete(folder, world_size):
            found.append((int(step), str(folder)))
    return max(found)[1] if found else None


def _is_complete(folder: Path, world_size: int) -> bool:
    if _read(folder) is None:
        return False
    states = len(list(folder.glob("rng_state*.pth")))
    # Another number of processes than before is for the host to accept or refuse.
    return states != 0 and (states >= world_size or (folder / "rng_state.pth").exists())


def _read(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
