"""How much less one method loses than another: forgetting at equal task loss, and damage (arXiv 2605.02105)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .curves import POINTS, SCALES, curve, pareto_frontier, shared_range
from .estimate import Estimate, Variation, interval, over_documents, over_seeds, ratio
from .losses import HeldOutLoss, check_same_documents, growth_by_document

# Half-width of an interval of the interpolation error, in units of the largest distance between the curves on three
# scales. Between subsets of 4 to 6 of 13 learning rates on a toy model, 2 covered the error in about 9 of 10 cases.
_SPREADS = 2.0

# Fewer runs on the frontier of a sweep than this are said to be few.
FEW_RUNS = 5


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


Sweep = Sequence[TunedRun]


@dataclass(frozen=True)
class ReductionCurve:
    """The reduction over the shared range of task losses, with a pointwise band.

    Attributes:
        task_loss (`np.ndarray`): nats per token, shape `(points,)`; with several seeds, means over them.
        reference, method (`np.ndarray`): forgetting of both, in nats per token.
        relative (`list[Estimate]`): 1 - method / reference.
    """

    task_loss: np.ndarray
    reference: np.ndarray
    method: np.ndarray
    relative: list[Estimate]

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "task_loss": self.task_loss.tolist(),
            "reference": self.reference.tolist(),
            "method": self.method.tolist(),
            "relative": [one.to_dict() for one in self.relative],
        }


@dataclass(frozen=True)
class Reduction:
    """How much less one method forgets than another at the same task losses.

    Attributes:
        low, high (`float`): ends of the range of task losses that both span, in nats per token; means over the seeds.
        reference, method (`float`): mean forgetting of both over that range, in nats per token.
        relative (`Estimate`): 1 - method / reference; 0.31 is 31% less. Not a number if the reference forgot nothing.
        end_reference, end_method (`float`): mean held-out loss of both over that range: where they ended.
        end_difference (`Estimate`): the second minus the first; negative if the method ended better.
        seeds (`int`): pairs of sweeps; the interval includes the variation between training seeds from two on.
        curve ([`ReductionCurve`]): the same at each task loss.
        warnings (`list[str]`): reasons to trust the figures less.
    """

    low: float
    high: float
    reference: float
    method: float
    relative: Estimate
    end_reference: float
    end_method: float
    end_difference: Estimate
    seeds: int
    curve: ReductionCurve
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """For JSON."""
        estimates = {name: getattr(self, name).to_dict() for name in ("relative", "end_difference")}
        return {**vars(self), **estimates, "curve": self.curve.to_dict()}


def forgetting_reduction(
    reference: Sweep | Sequence[Sweep], method: Sweep | Sequence[Sweep], *, confidence: float = 0.95
) -> Reduction:
    """Reduction of forgetting at equal task loss (arXiv 2605.02105), over all task losses that both sweeps span.

    The reduction is 1 minus the ratio of the mean forgetting of both. Its interval includes the variation over the old
    documents and over those of the task (jackknife; each time with curves and range of their own), the variation over
    training seeds where there are several, and the error of the interpolation: twice the distance between cubics on
    three scales.

    Args:
        reference, method (`Sequence[TunedRun]` or a sequence of these): the two sweeps, measured on the same data; or a
            sweep for each training seed, where those at the same place are a pair.
        confidence (`float`, defaults to 0.95): probability of the interval.

    Raises:
        ImportError: if scipy is missing.
        ValueError: if the sweeps share no task loss, the data or the number of seeds differs, or `confidence` is not
            between 0 and 1.
    """
    pairs = _pairs(reference, method)
    runs = [run for pair in pairs for sweep in pair for run in sweep]
    for run in runs:
        check_same_documents(runs[0].before, run.before)
        check_same_documents(runs[0].task, run.task)
    statistic = _Statistic(pairs)
    growth = np.stack([run.after.document_losses - run.before.document_losses for run in runs], axis=1)
    task = np.stack([run.task.document_losses for run in runs], axis=1)
    old_tokens, task_tokens = runs[0].before.document_tokens, runs[0].task.document_tokens
    lost, learned = growth.sum(0) / old_tokens.sum(), task.sum(0) / task_tokens.sum()
    low, high = statistic.range(learned)
    others = [curves.reshape(2, POINTS) for curves in statistic.on_other_scales(learned, lost)]
    curves = statistic(learned, lost).reshape(2, POINTS)
    ends = [np.mean([pair[which][0].before.loss for pair in pairs]) for which in (0, 1)]
    weights = np.full(POINTS, 1 / (POINTS - 1))
    weights[[0, -1]] /= 2
    problem = statistic.problem()
    before = np.stack([pair[which][0].before.document_losses for pair in pairs for which in (1, 0)], axis=1)
    bases = before.sum(0) / old_tokens.sum()

    def measure(learned: np.ndarray, lost: np.ndarray, bases: np.ndarray) -> np.ndarray:
        """By seed: both curves, and where the method ended minus where the reference did, shape `(seeds, size)`."""
        both = statistic.by_seed(learned, lost)
        ended = both.reshape(-1, 2, POINTS) @ weights + bases.reshape(-1, 2)
        return np.concatenate([both, ended[:, :1] - ended[:, 1:]], axis=1)

    old, split = np.concatenate([growth, before], axis=1), growth.shape[1]
    measured = [
        over_documents(
            old,
            old_tokens,
            lambda means: measure(learned, means[:split], means[split:]).mean(0),
            "documents of old data",
        ),
        over_documents(task, task_tokens, lambda means: measure(means, lost, bases).mean(0), "documents of task data"),
    ]
    if len(pairs) > 1:
        measured.append(over_seeds(measure(learned, lost, bases)))
    variations = [_part(one, slice(None, -1)) for one in measured]
    end_variations = [_part(one, slice(-1, None)) for one in measured]

    def reduction(weights: np.ndarray) -> Estimate:
        if (curves @ weights)[1] <= 0:
            return Estimate(math.nan, math.nan, math.nan, confidence, "the reference forgot nothing")
        found = _ratio(curves @ weights, [_project(one, weights) for one in variations], confidence)
        spread = max((abs(_quotient(other @ weights) - found.value) for other in others), default=0.0)
        return _reduction(found, _SPREADS * spread, problem)

    points = np.eye(POINTS)[:: (POINTS - 1) // 20]
    at = np.linspace(low, high, POINTS)
    mean_method, mean_reference = curves @ weights
    return Reduction(
        low,
        high,
        float(mean_reference),
        float(mean_method),
        reduction(weights),
        float(ends[0] + mean_reference),
        float(ends[1] + mean_method),
        _difference(curves @ weights, [other @ weights for other in others], ends, end_variations, problem, confidence),
        len(pairs),
        ReductionCurve(points @ at, points @ curves[1], points @ curves[0], [reduction(point) for point in points]),
        statistic.warnings(learned),
    )


def damage_reduction(
    reference: Sequence[tuple[HeldOutLoss, HeldOutLoss]],
    method: Sequence[tuple[HeldOutLoss, HeldOutLoss]],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """How much smaller the growth of a loss is for one method than for another, e.g. the damage of quantization.

    Args:
        reference, method (`Sequence[tuple[HeldOutLoss, HeldOutLoss]]`): losses before and after, a pair for each
            training seed; those at the same place belong together. All of the same documents.
        confidence (`float`, defaults to 0.95): probability of the interval.

    Returns:
        [`Estimate`]: 1 - method / reference; 0.4 is 40% less.

    Raises:
        ValueError: if the documents or the number of seeds differ.
    """
    _check_seeds(reference, method)
    columns, tokens = growth_by_document([*method, *reference])
    seeds = len(method)
    by_seed = (columns.sum(0) / tokens.sum()).reshape(2, seeds).T
    documents = over_documents(np.stack([columns[:, :seeds].mean(1), columns[:, seeds:].mean(1)], axis=1), tokens)
    variations = [documents] + ([over_seeds(by_seed)] if seeds > 1 else [])
    return _reduction(_ratio(by_seed.mean(0), variations, confidence))


def _check_seeds(reference: Sequence, method: Sequence) -> None:
    if not reference or len(reference) != len(method):
        raise ValueError(
            f"There are {len(reference)} seeds of the reference and {len(method)} of the method; give both the same."
        )


def _pairs(reference, method) -> list[tuple[Sweep, Sweep]]:
    sweeps = [[one] if all(isinstance(run, TunedRun) for run in one) else list(one) for one in (reference, method)]
    _check_seeds(*sweeps)
    if not all(sweep for one in sweeps for sweep in one):
        raise ValueError("A sweep holds no runs, so that there is no forgetting to compare.")
    return list(zip(*sweeps, strict=True))


class _Statistic:
    """Curves of forgetting of the method and of the reference, as a function of the mean losses of all runs."""

    def __init__(self, pairs: list[tuple[Sweep, Sweep]]):
        self._names = [[run.name for run in sweep] for pair in pairs for sweep in pair]
        self._chosen: list[tuple[list[int], list[int]]] = []  # places of the runs on the frontiers, by seed
        start = 0
        for pair in pairs:
            places = []
            for sweep in pair:
                frontier = pareto_frontier([(run.task.loss, run.forgetting) for run in sweep])
                places.append([start + i for i in frontier])
                start += len(sweep)
            shared_range(*([(run.task.loss, run.forgetting) for run in sweep] for sweep in pair))
            self._chosen.append(tuple(places))

    def __call__(self, learned: np.ndarray, lost: np.ndarray) -> np.ndarray:
        return self.by_seed(learned, lost).mean(0)

    def by_seed(self, learned: np.ndarray, lost: np.ndarray, scale=SCALES[0]) -> np.ndarray:
        """Shape `(seeds, 2 * POINTS)`, the method first."""
        rows = []
        for reference, method in self._chosen:
            low, high = self._ends(learned, reference, method)
            row = []
            for places in (method, reference):
                losses = learned[places]
                at = np.clip(np.linspace(low, high, POINTS), losses.min(), losses.max())
                row.append(curve(list(zip(losses, lost[places], strict=True)), at, scale))
            rows.append(np.concatenate(row))
        return np.stack(rows)

    def on_other_scales(self, learned: np.ndarray, lost: np.ndarray) -> list[np.ndarray]:
        """The curves on other scales, where those exist."""
        chosen = np.asarray(sorted({place for pair in self._chosen for places in pair for place in places}))
        scales = SCALES[1:] if (lost[chosen] > 0).all() else SCALES[1:2]
        return [self.by_seed(learned, lost, scale).mean(0) for scale in scales]

    def range(self, learned: np.ndarray) -> tuple[float, float]:
        low, high = np.mean([self._ends(learned, *pair) for pair in self._chosen], axis=0)
        return float(low), float(high)

    def _ends(self, learned: np.ndarray, reference: list[int], method: list[int]) -> tuple[float, float]:
        sides = learned[reference], learned[method]
        return max(side.min() for side in sides), min(side.max() for side in sides)

    def _fewest(self) -> int:
        return min(len(places) for pair in self._chosen for places in pair)

    def problem(self) -> str:
        """Why there is no interval; empty if there is one."""
        if self._fewest() < 3:
            return "a sweep has fewer than three runs on its frontier, which do not show how the curve bends"
        return ""

    def warnings(self, learned: np.ndarray) -> list[str]:
        found = []
        if self._fewest() < FEW_RUNS:
            found.append(f"A sweep has {self._fewest()} runs on its frontier; use {FEW_RUNS} learning rates or more.")
        if any(names != self._names[0] for names in self._names):
            found.append("The sweeps have other runs (learning rates), so that each is interpolated between others.")
        whole = [np.ptp(learned[places]) for pair in self._chosen for places in pair]
        low, high = self.range(learned)
        if high - low < max(whole) / 2:
            found.append("The sweeps share less than half of the task losses of the wider one.")
        if len(self._chosen) == 1:
            found.append("One training seed: the interval does not include the variation between seeds.")
        return found


def _part(variation: Variation, part: slice) -> Variation:
    """The variation of some of the estimates."""
    return Variation(variation.source, variation.covariance[part, part], variation.degrees, variation.problem)


def _project(variation: Variation, weights: np.ndarray) -> Variation:
    """The variation of the weighted means of both curves."""
    matrix = np.kron(np.eye(2), weights)
    return Variation(variation.source, matrix @ variation.covariance @ matrix.T, variation.degrees, variation.problem)


def _ratio(values: np.ndarray, variations: Sequence[Variation], confidence: float) -> Estimate:
    return ratio(float(values[0]), float(values[1]), variations, confidence)


def _quotient(values: np.ndarray) -> float:
    return float(values[0] / values[1]) if values[1] else math.nan


def _difference(
    lost: np.ndarray,
    on_other_scales: Sequence[np.ndarray],
    bases: Sequence[float],
    variations: Sequence[Variation],
    problem: str,
    confidence: float,
) -> Estimate:
    """Where the method ended minus where the reference did; `lost` is (method, reference), `bases` the other way."""
    found = interval(float(lost[0] - lost[1] + bases[1] - bases[0]), [1.0], variations, confidence)
    if problem or found.problem:
        return Estimate(found.value, math.nan, math.nan, confidence, problem or found.problem)
    spread = _SPREADS * max(
        (abs(float(np.diff(other)[0] - np.diff(lost)[0])) for other in on_other_scales), default=0.0
    )
    half = math.hypot(found.high - found.value, spread)
    return Estimate(found.value, found.value - half, found.value + half, confidence)


def _reduction(found: Estimate, spread: float = 0.0, problem: str = "") -> Estimate:
    """1 - ratio; `spread`, an error of the ratio, is added in quadrature to both sides of the interval."""
    if problem or found.problem:
        return Estimate(1 - found.value, math.nan, math.nan, found.confidence, problem or found.problem)
    below, above = (math.hypot(end - found.value, spread) for end in (found.low, found.high))
    return Estimate(1 - found.value, 1 - found.value - above, 1 - found.value + below, found.confidence)
