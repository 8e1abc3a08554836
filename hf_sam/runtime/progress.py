"""Progress bars on the main process."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from transformers.utils import logging

from .distributed import rank_and_world

T = TypeVar("T")

# Bars of measures inside of measures: the outermost two are shown.
_SHOWN = 2
_open_bars = 0
_title = ""


@contextlib.contextmanager
def titled(title: str) -> Iterator[None]:
    """Inside, progress bars begin with what is being measured."""
    global _title
    before, _title = _title, f"{title}: "
    try:
        yield
    finally:
        _title = before


def progress(iterable: Iterable[T], description: str, length: int | None = None) -> Iterator[T]:
    """A progress bar on the main process, unless `transformers.utils.logging.disable_progress_bar` turned bars off."""
    global _open_bars
    if rank_and_world()[0] != 0 or _open_bars >= _SHOWN:
        yield from iterable
        return
    _open_bars += 1
    try:
        yield from logging.tqdm(iterable, desc=_title + description, total=length, leave=False)
    finally:
        _open_bars -= 1
