"""Methods that do nothing for a while: what a second pass would tell was told by the first."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def muted(owner: Any, name: str) -> Iterator[None]:
    """Inside, the method `name` of `owner` does nothing, whichever class defines it."""
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
