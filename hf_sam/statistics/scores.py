"""Scores of benchmarks at equal task loss: like forgetting, they depend on how much a model has learned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .curves import POINTS, SCALES, curve, shared_range
from .estimate import Estimate, interval, over_documents, over_seeds
from .losses import HeldOutLoss

# Half-width of an interval of the interpolation error, in units of the distance from straight lines.
_SPREADS = 2.0


@dataclass(frozen=True)
class ScoredRun:
    """One fine-tuned model of a sweep with its scores.

    Attributes:
        task (`HeldOutLoss`): held-out fine-tuning data.
        scores (`Sequence[np.ndarray]`): score of each example, for each benchmark; more is better.
    """

    task: HeldOutLoss
    scores: Sequence[np.ndarray]

    @property
    def mean(self) -> float:
        """Mean over the benchmarks."""
        return float(np.mean([scores.mean() for scores in self.scores]))


@dataclass(frozen=True)
class ScoreDifference:
    """Scores of two methods at the same task losses.

    Attributes:
        low, high (`float`): ends of the range of task losses that both span, in nats per token; means over the seeds.
        reference, method (`float`): mean scores of both over that range.
        difference (`Estimate`): the second minus the first.
    """

    low: float
    high: float
    reference: float
    method: float
    difference: Estimate


def score_difference(
    reference: Sequence[Sequence[ScoredRun]], method: Sequence[Sequence[ScoredRun]], *, confidence: float = 0.95
) -> ScoreDifference:
    """Scores of one method minus those of another at equal task loss, over all task losses that both sweeps span.

    Monotone cubics (PCHIP) pass through the mean scores of the runs. The interval includes the variation over the
    examples of each benchmark, over the documents of the task, and over training seeds where there are several, and the
    error of the interpolation: twice the distance from straight lines.

    Args:
        reference, method (`Sequence[Sequence[ScoredRun]]`): a sweep for each training seed; those at the same place are
            a pair. All were measured on the same data and benchmarks.
        confidence (`float`, defaults to 0.95): probability of the interval.

    Raises:
        ImportError: if scipy is missing.
        ValueError: if the sweeps share no task loss.
    """
    pairs = list(zip(reference, method, strict=True))
    for pair in pairs:
        # Scores are not part of the range: nothing is left out, unless two runs have one task loss.
        shared_range(*([(run.task.loss, -run.task.loss) for run in sweep] for sweep in pair))
    runs = [run for pair in pairs for sweep in pair for run in sweep]
    learned = np.stack([run.task.document_losses for run in runs], axis=1)
    tokens = runs[0].task.document_tokens
    losses = learned.sum(0) / tokens.sum()
    scores = [np.stack(by_run, axis=1) for by_run in zip(*(run.scores for run in runs), strict=True)]
    means = [one.mean(0) for one in scores]

    def levels(losses: np.ndarray, mean: np.ndarray, straight: bool = False) -> np.ndarray:
        """Mean scores over the shared range by seed, shape `(seeds, 2)`, the reference first, and its ends."""
        rows, start = [], 0
        for pair in pairs:
            places = []
            for sweep in pair:
                places.append(slice(start, start + len(sweep)))
                start += len(sweep)
            low, high = max(losses[p].min() for p in places), min(losses[p].max() for p in places)
            row = []
            for place in places:
                at = np.clip(np.linspace(low, high, POINTS), losses[place].min(), losses[place].max())
                points = list(zip(losses[place], mean[place], strict=True))
                values = np.interp(at, *zip(*sorted(points), strict=True)) if straight else curve(points, at, SCALES[1])
                row.append(np.trapezoid(values, dx=1 / (POINTS - 1)))
            rows.append([*row, low, high])
        return np.asarray(rows)

    def difference(losses: np.ndarray, mean: np.ndarray) -> np.ndarray:
        found = levels(losses, mean)
        return found[:, 1:2] - found[:, :1]

    mean = np.mean(means, axis=0)
    variations = [
        over_documents(learned, tokens, lambda values: difference(values, mean).mean(0), "documents of task data")
    ]
    for i, one in enumerate(scores):

        def of_benchmark(values: np.ndarray, i: int = i) -> np.ndarray:
            return difference(losses, np.mean([*means[:i], values, *means[i + 1 :]], axis=0)).mean(0)

        variations.append(over_documents(one, np.ones(len(one)), of_benchmark, "examples"))
    if len(pairs) > 1:
        variations.append(over_seeds(difference(losses, mean)))
    first, second, low, high = levels(losses, mean).mean(0)
    found = interval(float(second - first), [1.0], variations, confidence)
    if any(len(sweep) < 3 for pair in pairs for sweep in pair):
        problem = "a sweep has fewer than three runs on its frontier, which do not show how the curve bends"
        found = Estimate(found.value, math.nan, math.nan, confidence, problem)
    if not found.problem:
        straight = levels(losses, mean, straight=True).mean(0)
        half = math.hypot(found.high - found.value, _SPREADS * (straight[1] - straight[0] - found.value))
        found = Estimate(found.value, found.value - half, found.value + half, confidence)
    return ScoreDifference(float(low), float(high), float(first), float(second), found)
