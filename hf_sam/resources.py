"""What runs need of the disk: space, told before they begin, and files that are whole or not there."""

import json
import math
import os
import shutil
from pathlib import Path


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raises OSError if there are not `needed` bytes free on the disk of `folder`, which need not exist yet."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(
            f"No disk space: {what} needs {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} are free at {path}."
        )


def write_json(path: Path, value: dict) -> None:
    """Write strict JSON, all of it or nothing; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finite(value):
    """`value` for strict JSON: keys as text, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
