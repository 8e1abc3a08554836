"""Loss on a grid of a plane in weight space, and its picture."""

from dataclasses import dataclass, field

import numpy as np

from ..runtime.figure import figure, literal
from ..runtime.progress import progress
from .displacement import Displacement
from .loss import held_out_loss


@dataclass(frozen=True)
class LossPlane:
    """Loss on a grid of a plane in weight space.

    Attributes:
        x, y (`tuple[float, ...]`): coordinates along two orthogonal directions: distances in weight space for a
            plane through models, multiples of the filter-normalized directions for a random one.
        losses (`tuple[tuple[float, ...], ...]`): nats per token; one row for each y.
        points (`dict[str, tuple[float, float]]`): where the models lie.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    points: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(vars(self))


def scan_grid(model, params, data, x, y, place) -> tuple[tuple[float, ...], ...]:
    """Losses at the points of a grid, one row for each y; `place(x, y)` is for [`Displacement.move`]."""
    points = [(px, py) for py in y for px in x]
    with Displacement(model, params) as displacement:
        losses = []
        for px, py in progress(points, "loss on the plane", len(points)):
            displacement.move(place(px, py))
            losses.append(held_out_loss(model, data).loss)
    return tuple(tuple(losses[row * len(x) : (row + 1) * len(x)]) for row in range(len(y)))


def axis_over(coordinates: list[float], steps: int, margin: float) -> tuple[float, ...]:
    """Evenly spaced positions over the extent of `coordinates` and a margin, a share of the extent, on both sides."""
    if steps < 2 or margin < 0:
        raise ValueError(f"steps={steps} must be at least 2, and margin={margin} not negative.")
    low, high = min(coordinates), max(coordinates)
    reach = margin * (high - low)
    return tuple(float(value) for value in np.linspace(low - reach, high + reach, steps))


def plot_plane(plane: dict) -> bytes:
    """Contours of the loss on a plane, with the models on it.

    Args:
        plane (`dict`): [`LossPlane`] as `to_dict` gives it.
    """
    with figure("distance in weight space", "distance in weight space") as (render, axes):
        contours = axes.contourf(plane["x"], plane["y"], plane["losses"], levels=20, cmap="viridis")
        axes.figure.colorbar(contours, label="held-out loss (nats per token)")
        for name, (x, y) in plane["points"].items():
            axes.plot(x, y, "o", color="white", markeredgecolor="black")
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
            axes.annotate(literal(name), (x, y), xytext=(6, 6), textcoords="offset points", bbox=box)
        if list(plane["points"]) == ["model"]:
            axes.set_xlabel("first random direction")
            axes.set_ylabel("second random direction")
        return render()
