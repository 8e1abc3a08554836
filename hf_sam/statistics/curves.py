"""Curves of forgetting against task loss through the runs of a sweep (arXiv 2605.02105, arXiv 2503.19206).

A method that learns less also forgets less, so methods are compared at equal task loss, in between the runs of a sweep.
Forgetting is a convex function of the task loss: near the base it grows with the square of the distance. The curve is
therefore a monotone cubic (PCHIP; Fritsch and Butland 1984) through the square roots, which bends like a power and
also passes through negative forgetting. Nothing is extrapolated.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..runtime.packages import require

# Points of a curve in which its mean is computed.
POINTS = 101

Points = Sequence[tuple[float, float]]


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: np.ndarray) -> np.ndarray:
    return values * np.abs(values)


# Scales on which a cubic through the runs is drawn, with their inverses. The first is that of all results; how far
# apart the curves are is the error of the interpolation.
SCALES: tuple[tuple[Callable, Callable], ...] = ((_root, _square), (np.asarray, np.asarray), (np.log, np.exp))


def pareto_frontier(points: Points) -> list[int]:
    """Indices of the points that no other beats in both coordinates, in ascending order of the first.

    Args:
        points (`Sequence[tuple[float, float]]`): (task loss, forgetting); less is better in both.
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    frontier: list[int] = []
    for i in order:
        if not frontier or points[i][1] < points[frontier[-1]][1]:
            frontier.append(i)
    return frontier


def curve(points: Points, at: np.ndarray, scale: tuple[Callable, Callable] = SCALES[0]) -> np.ndarray:
    """Forgetting at task losses between the points of a sweep.

    Args:
        points (`Sequence[tuple[float, float]]`): (task loss, forgetting) of the runs, all of which the curve passes.
        at (`np.ndarray`): task losses within the range of the points.
        scale (`tuple[Callable, Callable]`): the scale on which the cubic is drawn, and its inverse.
    """
    require("scipy", "A curve through the runs of a sweep")
    from scipy.interpolate import PchipInterpolator

    ordered = np.asarray(sorted(points), dtype=np.float64)
    losses, first = np.unique(ordered[:, 0], return_index=True)
    values = scale[0](ordered[first, 1])
    if len(losses) == 1:
        return np.full(np.shape(at), scale[1](values[0]))
    return scale[1](PchipInterpolator(losses, values)(at))


def forgetting_at(task_loss: float, points: Points) -> float:
    """Forgetting on the Pareto frontier of a sweep at a given task loss.

    Args:
        task_loss (`float`): nats per token.
        points (`Sequence[tuple[float, float]]`): (task loss, forgetting) of each run of the sweep.

    Raises:
        ImportError: if scipy is missing.
        ValueError: if the frontier does not reach from above to below that loss: nothing is extrapolated.
    """
    frontier = [points[i] for i in pareto_frontier(points)]
    if not frontier or not frontier[0][0] <= task_loss <= frontier[-1][0]:
        losses = [loss for loss, _ in frontier]
        raise ValueError(
            f"The sweep does not span a task loss of {task_loss:.4f}: its frontier reaches from "
            f"{min(losses, default=np.nan):.4f} to {max(losses, default=np.nan):.4f}. Add runs with other learning "
            "rates, or choose a loss in between."
        )
    return float(curve(frontier, np.asarray([task_loss]))[0])


def shared_range(*sweeps: Points) -> tuple[float, float]:
    """Lowest and highest task loss that the frontiers of all sweeps span.

    Raises:
        ValueError: if there is none.
    """
    ends = []
    for points in sweeps:
        frontier = [points[i][0] for i in pareto_frontier(points)]
        ends.append((min(frontier, default=np.inf), max(frontier, default=-np.inf)))
    low, high = max(low for low, _ in ends), min(high for _, high in ends)
    if low > high:
        ranges = ", ".join(f"{low:.4f} to {high:.4f}" for low, high in ends)
        raise ValueError(f"The sweeps share no task loss to compare at: {ranges}. Widen their learning rates.")
    return float(low), float(high)
