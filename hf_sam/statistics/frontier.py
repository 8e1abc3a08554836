"""The learning-forgetting tradeoff over a sweep of fine-tuning runs (arXiv 2605.02105, arXiv 2503.19206).

A method that learns less also forgets less. Methods are therefore compared at equal fine-tuning loss, interpolated
between the runs of a sweep and never extrapolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, interval, resampled_sums
from .losses import HeldOutLoss, check_same_documents


@dataclass(frozen=True)
class TunedRun:
    """One fine-tuned model of a sweep.

    Attributes:
        name (`str`): e.g. the learning rate.
        before (`HeldOutLoss`): old data, base model.
        after (`HeldOutLoss`): old data, this model.
        task (`HeldOutLoss`): held-out fine-tuning data, this model.
    """

    name: str
    before: HeldOutLoss
    after: HeldOutLoss
    task: HeldOutLoss

    def __post_init__(self):
        check_same_documents(self.before, self.after)

    @property
    def forgetting(self) -> float:
        """Held-out loss after minus before, in nats per token."""
        return self.after.loss - self.before.loss


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
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


def forgetting_at(task_loss: float, points: Sequence[tuple[float, float]]) -> float:
    """Forgetting on the Pareto frontier of a sweep at a given task loss, interpolated linearly.

    Args:
        task_loss (`float`): nats per token.
        points (`Sequence[tuple[float, float]]`): (task loss, forgetting) of each run of the sweep.

    Raises:
        ValueError: if the frontier does not reach from above to below that loss: nothing is extrapolated.
    """
    value = _interpolated(task_loss, points)
    if value is None:
        frontier = [points[i][0] for i in pareto_frontier(points)]
        raise ValueError(
            f"The sweep does not span a task loss of {task_loss:.4f}: its frontier reaches from "
            f"{min(frontier, default=np.nan):.4f} to {max(frontier, default=np.nan):.4f}. Add runs with other learning "
            "rates, or choose a loss in between."
        )
    return value


def _interpolated(task_loss: float, points: Sequence[tuple[float, float]]) -> float | None:
    frontier = [points[i] for i in pareto_frontier(points)]
    if not frontier or not frontier[0][0] <= task_loss <= frontier[-1][0]:
        return None
    losses, lost = zip(*frontier, strict=True)
    return float(np.interp(task_loss, losses, lost))


def shared_range(*sweeps: Sequence[tuple[float, float]]) -> tuple[float, float]:
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


@dataclass(frozen=True)
class Reduction:
    """How much less one method forgets than another at the same task loss.

    Attributes:
        task_loss (`float`): where they are compared, in nats per token.
        reference, method (`float`): forgetting of both there, in nats per token.
        relative (`Estimate`): 1 - method / reference; 0.31 is 31% less.
        end_reference, end_method (`float`): held-out loss of both there: where it ended, not what was lost.
        used (`float`): share of the resamples whose sweeps span that task loss; the interval is of those.
    """

    task_loss: float
    reference: float
    method: float
    relative: Estimate
    end_reference: float
    end_method: float
    used: float

    def to_dict(self) -> dict:
        """For JSON."""
        return {**vars(self), "relative": self.relative.to_dict()}


def forgetting_reduction(
    reference: Sequence[TunedRun],
    method: Sequence[TunedRun],
    *,
    task_loss: float | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Reduction:
    """Reduction of forgetting at matched fine-tuning loss (arXiv 2605.02105), with its interval.

    The interval comes from resampling documents, separately for the old data and the task, and the same ones for all
    runs of both sweeps. It does not include the variation between training seeds.

    Args:
        reference, method (`Sequence[TunedRun]`): the two sweeps, measured on the same data.
        task_loss (`float`, *optional*): where to compare; the middle of the range that both span when omitted.
        confidence (`float`, defaults to 0.95): probability of the interval.
        resamples (`int`, defaults to 1000): resamples of the documents.
        seed (`int`, defaults to 0): seed of the resampling.

    Raises:
        ValueError: if a sweep does not span the task loss, the data differs, or the reference forgets nothing there.
    """
    runs = [*reference, *method]
    for run in runs:
        check_same_documents(runs[0].before, run.before)
        check_same_documents(runs[0].task, run.task)
    sweeps = [_points(reference), _points(method)]
    if task_loss is None:
        task_loss = sum(shared_range(*sweeps)) / 2
    lost = [forgetting_at(task_loss, points) for points in sweeps]
    if lost[0] <= 0:
        raise ValueError(
            f"The reference forgets nothing at a task loss of {task_loss:.4f} ({lost[0]:.4f} nats), so that there is "
            "no reduction to speak of."
        )
    ratios = []
    points = _resampled(runs, resamples, seed)
    drawn = points[:, : len(reference)].tolist(), points[:, len(reference) :].tolist()
    for resample in range(resamples):
        a, b = (_interpolated(task_loss, sweep[resample]) for sweep in drawn)
        if a is not None and b is not None and a > 0:
            ratios.append(1 - b / a)
    if not ratios:
        raise ValueError(
            f"No resample of the documents spans a task loss of {task_loss:.4f}; choose one further inside."
        )
    documents = min(len(runs[0].before.document_tokens), len(runs[0].task.document_tokens))
    relative = interval(1 - lost[1] / lost[0], np.asarray(ratios), confidence, documents)
    ends = [
        forgetting_at(task_loss, [(x, run.after.loss) for (x, _), run in zip(points, sweep, strict=True)])
        for points, sweep in zip(sweeps, (reference, method), strict=True)
    ]
    return Reduction(task_loss, lost[0], lost[1], relative, *ends, used=len(ratios) / resamples)


def _points(sweep: Sequence[TunedRun]) -> list[tuple[float, float]]:
    return [(run.task.loss, run.forgetting) for run in sweep]


def _resampled(runs: Sequence[TunedRun], resamples: int, seed: int) -> np.ndarray:
    """(task loss, forgetting) of each run in each resample; shape `(resamples, runs, 2)`."""

    def ratios(numerators: list[np.ndarray], tokens: np.ndarray, seed: int) -> np.ndarray:
        sums = resampled_sums(np.stack([*numerators, tokens], axis=1), resamples, seed)
        return sums[:, :-1] / np.maximum(sums[:, -1:], 1)

    task = ratios([run.task.document_losses for run in runs], runs[0].task.document_tokens, seed + 1)
    growth = [run.after.document_losses - run.before.document_losses for run in runs]
    lost = ratios(growth, runs[0].before.document_tokens, seed)
    return np.stack([task, lost], axis=2)


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
