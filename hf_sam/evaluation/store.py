"""Results on disk, one file per part, so that an interrupted evaluation can resume.

A part is known by a hash of everything that it depends on: weights, tokens, settings and versions of packages.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..runtime.disk import check_disk, write_json
from ..runtime.distributed import broadcast, compute_on_first, rank_and_world
from ..runtime.errors import MeasurementError
from ..runtime.fingerprint import fingerprint

# What a large evaluation writes: results of some thousand documents, and plots.
_SPACE = 64 << 20

# What may keep a part from being measured, and leaves the others: a model that diverged, or too little memory.
FAILURES = (MeasurementError, FloatingPointError, ValueError, MemoryError, torch.OutOfMemoryError)


class PartStore:
    """Computes each part once and stores it in a folder.

    Args:
        folder (`str` or `Path`): of the evaluation.
        versions (`dict[str, str]`): of all packages that results depend on.
        write (`bool`, defaults to `True`): make the folder if need be; a dry run does not.

    Raises:
        OSError: if the folder cannot be written to, or its disk is full.
    """

    def __init__(self, folder: str | Path, versions: dict[str, str], write: bool = True):
        self.versions = versions
        self.folder = Path(folder) / "parts"
        self.records: list[dict] = []
        if write:
            compute_on_first(self._prepare)

    def _prepare(self) -> None:
        check_disk(self.folder, _SPACE, f"an evaluation in {str(self.folder.parent)!r}")
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, about: dict, depends: dict) -> bool:
        """Whether a part is stored."""
        return broadcast(self._read(about, depends) is not None)

    def part(self, about: dict, depends: dict, compute: Callable[[], dict]) -> dict | None:
        """The result of a part, computed unless it is stored.

        If it fails, the record holds the error, and the evaluation continues. Errors are not written to disk, so that a
        later run tries again.

        Args:
            about (`dict`): what it is, for the report: `part`, `model`, `variant`, `data`.
            depends (`dict`): what it depends on besides, for its hash.
            compute (`Callable`): makes the result, for JSON; called on all processes or on none.
        """
        record = broadcast(self._read(about, depends))
        if record is None:
            started = time.perf_counter()
            try:
                record = {**about, "result": compute(), "seconds": round(time.perf_counter() - started, 3)}
            except FAILURES as error:
                record = {**about, "result": None, "error": str(error) or type(error).__name__}
            except RuntimeError as error:
                if "allocate memory" not in str(error):  # how torch says that a CPU has too little
                    raise
                record = {**about, "result": None, "error": str(error)}
            if rank_and_world()[0] == 0 and "error" not in record:
                write_json(self._path(about, depends), record)
                # As it will be read back: numbers that JSON cannot hold are None.
                record = json.loads(self._path(about, depends).read_text(encoding="utf-8"))
            record = broadcast(record)
        self.records.append(record)
        return record["result"]

    def _path(self, about: dict, depends: dict) -> Path:
        label = "-".join(str(about[name]) for name in ("part", "model", "variant", "data") if about.get(name))
        readable = "".join(c if c.isalnum() or c in "-." else "_" for c in label)[:80]
        return self.folder / f"{readable}-{fingerprint([about, depends, self.versions])}.json"

    def _read(self, about: dict, depends: dict) -> dict | None:
        path = self._path(about, depends)
        if rank_and_world()[0] != 0 or not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # truncated, e.g. by a full disk: measured again
            return None
        return record if isinstance(record, dict) and record.get("result") is not None else None
