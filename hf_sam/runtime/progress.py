"""Progress bars of transformers, on the main process."""

from collections.abc import Iterable
from typing import TypeVar

from transformers.utils import logging

from .distributed import rank_and_world

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, length: int | None = None) -> Iterable[T]:
    """A progress bar on rank 0; `transformers.utils.logging.disable_progress_bar` turns it off.

    Args:
        iterable (`Iterable`): what to iterate over.
        description (`str`): text in front of the bar.
        length (`int`, *optional*): number of items, if `iterable` has no length.
    """
    return logging.tqdm(iterable, desc=description, total=length, leave=False, disable=rank_and_world()[0] != 0)
