"""Matplotlib figures rendered to PNG, without a display. Needs matplotlib (extra `eval`)."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator

from .packages import require


@contextlib.contextmanager
def figure(x: str, y: str) -> Iterator[tuple[Callable[[], bytes], object]]:
    """Open a figure with one pair of axes.

    Args:
        x, y (`str`): labels of the axes.

    Yields:
        `tuple[Callable[[], bytes], matplotlib.axes.Axes]`: a function that renders the figure to PNG, and the axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    require("matplotlib", "Plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which keeps figures alive and may look for a display.
    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)

    def render() -> bytes:
        buffer = io.BytesIO()
        # Without matplotlib's version in the metadata, equal figures give equal files.
        drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()

    try:
        yield render, axes
    finally:
        drawn.clear()


def markers() -> Iterator[str]:
    """Endless iterator over markers, one for each curve of a figure."""
    return itertools.cycle("osD^v<>")
