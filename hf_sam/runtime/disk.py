"""What runs need of the disk: space, told before they begin, and files that are whole or not there."""

import errno
import json
import math
import os
import shutil
import tempfile
from pathlib import Path


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Check that a folder can be written to, and that its disk has space.

    Args:
        folder (`str` or `Path`): need not exist yet.
        needed (`int`): bytes.
        what (`str`): what needs them, for the message.

    Raises:
        OSError: if there is no space, or the folder cannot be written to; see [`check_writable`].
    """
    place = check_writable(folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"No disk space: {what} needs {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} are free at {place}."
        )


def check_writable(folder: str | Path) -> Path:
    """Check that files can be written in a folder, or in the place where it would be made; leaves nothing there.

    Returns:
        `Path`: the folder, or what exists of the folders above it.

    Raises:
        OSError: as `PermissionError`, `NotADirectoryError` or `OSError`; the message says what is in the way.
    """
    path = Path(folder).absolute()
    while not os.path.lexists(path):
        path = path.parent
    try:
        # Permissions alone tell too little: root, network disks and containers have rules of their own.
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reasons = {
            errno.ENOTDIR: f"{path} is a file",
            errno.ENOENT: f"nothing can be made in {path}",
            errno.EACCES: f"you may not write to {path}",
            errno.EPERM: f"you may not write to {path}",
            errno.EROFS: f"the file system of {path} is read-only",
            errno.ENOSPC: f"no disk space is left at {path}",
            errno.EDQUOT: f"your disk quota at {path} is used up",
        }
        reason = reasons.get(error.errno, f"{path}: {error.strerror}")
        raise type(error)(
            f"The folder {str(folder)!r} cannot be written to: {reason}. Choose another output folder, or free it."
        ) from error


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
