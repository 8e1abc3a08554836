"""The budget from which on more pretraining makes the tuned model worse (arXiv 2503.19206)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InflectionPoint:
    """The pretraining budget from which on more pretraining makes the tuned model worse.

    Attributes:
        budget (`float`): pretraining budget of the best checkpoint, in the unit that was given.
        loss (`float`): loss there.
        degradation (`float`): loss of the last checkpoint minus the best.
    """

    budget: float
    loss: float
    degradation: float


def inflection_point(checkpoints: Sequence[tuple[float, float]], *, noise: float = 0.0) -> InflectionPoint | None:
    """The pretraining budget beyond which a tuned model gets worse (arXiv 2503.19206, catastrophic overtraining).

    Args:
        checkpoints (`Sequence[tuple[float, float]]`): (pretraining budget, loss after the modification), one or more
            for each budget; the best counts, so a sweep of learning rates is tuned at each checkpoint.
        noise (`float`, defaults to 0.0): how much the last checkpoint must be worse than the best to count, in the
            unit of the loss.

    Returns:
        [`InflectionPoint`] or `None`: `None` where more pretraining never made it worse.

    Raises:
        ValueError: for fewer than three budgets, which cannot show a turning point.
    """
    best: dict[float, float] = {}
    for budget, loss in checkpoints:
        best[budget] = min(loss, best.get(budget, np.inf))
    if len(best) < 3:
        raise ValueError(f"An inflection point needs checkpoints at three budgets or more, but there are {len(best)}.")
    lowest = min(best, key=lambda budget: (best[budget], budget))
    degradation = best[max(best)] - best[lowest]
    if lowest == max(best) or degradation <= noise:
        return None
    return InflectionPoint(float(lowest), float(best[lowest]), float(degradation))
