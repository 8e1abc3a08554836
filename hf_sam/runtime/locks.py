"""Locks between processes that the kernel releases when their holder dies, so none is ever left to be removed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock inside the block; wait for it if another process holds it.

    Processes that the holder forks do not hold the lock.

    Args:
        path (`Path`): file of the lock; stays when the lock is released.
        busy (`str`): printed if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, poll_interval=0.2)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(busy, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
