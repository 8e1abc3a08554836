"""Fingerprints of settings, data and weights: the first 16 hexadecimal digits of a SHA-256."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_DIGITS = 16


def fingerprint(content) -> str:
    """Fingerprint of bytes, a string, or any JSON value (the order of keys does not matter)."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content, sort_keys=True)
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:_DIGITS]


def fingerprint_of_files(paths: Iterable[Path], folder: Path) -> str:
    """Fingerprint of the contents of files and of their names relative to `folder`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content};".encode())
    return digest.hexdigest()[:_DIGITS]


def fingerprint_of_folder(folder: str | Path) -> str:
    """Fingerprint of all files below a folder; an empty string if `folder` is empty."""
    if not folder:
        return ""
    return fingerprint_of_files([path for path in Path(folder).rglob("*") if path.is_file()], Path(folder))


def seed_of(text: str) -> int:
    """Derive a seed from a text; 56 bits, which every random generator accepts."""
    # A hash, because a small seed would repeat the random numbers that initialized the weights.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
