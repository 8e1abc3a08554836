"""Disable a method temporarily, e.g. logging in the second pass, which would repeat that of the first."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def disable_method(owner: Any, name: str) -> Iterator[None]:
    """Context in which the method `name` of `owner` does nothing."""
    own = vars(owner)
    before = own.get(name, _ABSENT)
    own[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is _ABSENT:
            del own[name]
        else:
            own[name] = before


_ABSENT = object()
