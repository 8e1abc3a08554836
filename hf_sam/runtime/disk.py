"""Disk-space checks and atomic JSON writes."""

import errno
import json
import math
import os
import shutil
import tempfile
from pathlib import Path


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Check that a folder is writable and that its disk has enough free space.

    Args:
        folder (`str` or `Path`): the folder; need not exist yet.
        needed (`int`): bytes.
        what (`str`): subject of the error message.

    Raises:
        OSError: if there is not enough space, or the folder is not writable (see [`check_writable`]).
    """
    place = check_writable(folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"No disk space: {what} needs {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} are free at {place}."
        )


def check_writable(folder: str | Path) -> Path:
    """Check that files can be created in a folder, or in its nearest existing parent. Leaves no file behind.

    Returns:
        `Path`: the folder, or its nearest existing parent.

    Raises:
        OSError: `PermissionError`, `NotADirectoryError` or another subclass; the message names the cause.
    """
    path = Path(folder).absolute()
    while not os.path.lexists(path):
        path = path.parent
    try:
        # Permission bits are not enough: root, network disks and containers follow other rules.
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reasons = {
            errno.ENOTDIR: f"{path} is a file",
            errno.ENOENT: f"nothing can be created in {path}",
            errno.EACCES: f"you may not write to {path}",
            errno.EPERM: f"you may not write to {path}",
            errno.EROFS: f"the file system of {path} is read-only",
            errno.ENOSPC: f"no disk space is left at {path}",
            errno.EDQUOT: f"your disk quota at {path} is used up",
        }
        reason = reasons.get(error.errno, f"{path}: {error.strerror}")
        raise type(error)(
            f"The folder {str(folder)!r} cannot be written to: {reason}. Choose another output folder, or make it "
            "writable."
        ) from error


def write_json(path: Path, value: dict) -> None:
    """Write strict JSON atomically; non-finite numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict | None:
    """Read a JSON file; None if it does not exist or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finite(value):
    """Convert `value` for strict JSON: keys become strings, non-finite numbers become None."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
