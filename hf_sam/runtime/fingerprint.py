"""Hashes."""

import hashlib
from pathlib import Path


def hash_of_folder(folder: str) -> str:
    """Hash of all files below a folder; empty without one."""
    if not folder:
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
