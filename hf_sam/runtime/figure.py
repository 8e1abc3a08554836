"""Matplotlib figures rendered to PNG, without a display. Needs matplotlib (extra `eval`)."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator

from .packages import require

_MARKERS = "osD^v<>pXP"


@contextlib.contextmanager
def figure(x: str, y: str, title: str = "") -> Iterator[tuple[Callable[[], bytes], object]]:
    """Open a figure with one pair of axes; see [`panels`]."""
    with panels((x, y, title)) as (render, (axes,)):
        yield render, axes


@contextlib.contextmanager
def panels(
    *labels: tuple[str, str, str], width: float = 6.4, height: float = 4.4
) -> Iterator[tuple[Callable[[], bytes], list]]:
    """Open a figure with several pairs of axes, side by side.

    Args:
        labels (`tuple[str, str, str]`): of each pair, the x axis, the y axis and the title.
        width, height (`float`, defaults to 6.4, 4.4): size of each pair, in inches.

    Yields:
        `tuple[Callable[[], bytes], list[matplotlib.axes.Axes]]`: a function that renders the figure to PNG, and the
        axes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    require("matplotlib", "Plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which keeps figures alive and may look for a display.
    drawn = Figure(figsize=(width * len(labels), height), layout="constrained")
    FigureCanvasAgg(drawn)
    row = drawn.subplots(1, len(labels), squeeze=False)[0]
    for axes, (x, y, title) in zip(row, labels, strict=True):
        axes.set(xlabel=literal(x), ylabel=literal(y), title=literal(title))
        axes.grid(alpha=0.3)

    def render() -> bytes:
        buffer = io.BytesIO()
        # Without matplotlib's version in the metadata, equal figures give equal files.
        drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()

    try:
        yield render, list(row)
    finally:
        drawn.clear()


def styles(names: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and legend of the curve of each name, as keyword arguments of matplotlib."""
    return {
        name: {"color": f"C{i % 10}", "marker": _MARKERS[(i + i // 10) % len(_MARKERS)], "label": literal(name)}
        for i, name in enumerate(names)
    }


def literal(text: str) -> str:
    r"""A text as matplotlib shows it unchanged: without mathematics, and not hidden from legends as `_text` is."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
