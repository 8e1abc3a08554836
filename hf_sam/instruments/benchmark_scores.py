"""Scores of benchmark tasks: what each example contributes, the mean with its standard error, and changes of it."""

import math
from dataclasses import dataclass, field

import numpy as np

from ..runtime.errors import MeasurementError
from ..statistics.estimate import Estimate, interval, over_documents

# A task is scored by the first of these metrics that it reports, or by its first mean over examples.
METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity")

# Metrics that are functions of a log-likelihood of each example (in words or bytes; per example for `perplexity`).
_LIKELIHOODS = {"bits_per_byte": "identity", "word_perplexity": "exp", "byte_perplexity": "exp", "perplexity": "exp"}


@dataclass(frozen=True)
class BenchmarkResult:
    """Score of one task.

    Attributes:
        task (`str`): name in the harness.
        metric (`str`): e.g. `"acc_norm"`, from 0 to 1, or `"bits_per_byte"`.
        scores (`dict[str, float]`): score of each example by its number in the task; for perplexities its negative
            log-likelihood, in nats, and for bits per byte in bits.
        value (`float`): the harness's own aggregate of them.
        higher_is_better (`bool`, defaults to `True`): whether more is better.
        weights (`dict[str, float]`): number of words or bytes of each example; empty if all count the same.
        group (`bool`, defaults to `False`): whether it is a group, which holds the examples of other tasks.
    """

    task: str
    metric: str
    scores: dict[str, float]
    value: float
    higher_is_better: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    group: bool = False

    @property
    def in_per_cent(self) -> bool:
        """Whether the score is a share, e.g. an accuracy."""
        return self.metric not in _LIKELIHOODS and self.higher_is_better and 0 <= self.value <= 1

    @property
    def standard_error(self) -> float:
        """Of the value, over examples; nan for a single one."""
        variation = over_documents(*_arrays(self), source="examples")
        return abs(_slope(self)) * math.sqrt(variation.covariance[0, 0])

    def text(self) -> str:
        """The value and its standard error, in per cent for shares."""
        error = self.standard_error
        known = "" if math.isnan(error) else f" ± {100 * error:.1f}" if self.in_per_cent else f" ± {error:.3g}"
        return (f"{100 * self.value:.1f}" if self.in_per_cent else f"{self.value:.4g}") + known

    def to_dict(self) -> dict:
        """For JSON."""
        return {**vars(self), "standard_error": self.standard_error}

    @classmethod
    def from_dict(cls, values: dict) -> "BenchmarkResult":
        """The inverse of `to_dict`."""
        return cls(**{name: value for name, value in values.items() if name != "standard_error"})


def score_change(before: BenchmarkResult, after: BenchmarkResult, *, confidence: float = 0.95) -> Estimate:
    """Score after minus before, with its interval over the examples of a task, which are paired.

    For right-or-wrong scores the interval is that of Bonett and Price (2012), which does not shrink to nothing when few
    examples, or none, are answered in another way.

    Raises:
        ValueError: if the two were run on different examples.
    """
    if before.scores.keys() != after.scores.keys() or before.metric != after.metric:
        raise ValueError(f"The two runs of {before.task!r} have different examples or metrics.")
    change = after.value - before.value
    first, weights = _arrays(before)
    second, _ = _arrays(after)
    if not before.weights and set(np.unique([first, second])) <= {0.0, 1.0}:
        return _paired_proportions(first[:, 0], second[:, 0], confidence)
    variation = over_documents(np.concatenate([first, second], axis=1), weights, source="examples")
    return interval(change, [-_slope(before), _slope(after)], [variation], confidence)


def _paired_proportions(first: np.ndarray, second: np.ndarray, confidence: float) -> Estimate:
    from scipy.stats import norm

    count = len(first)
    gained, lost = ((second > first).sum() + 1) / (count + 2), ((second < first).sum() + 1) / (count + 2)
    middle = gained - lost
    half = norm.ppf((1 + confidence) / 2) * math.sqrt((gained + lost - middle**2) / (count + 2))
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Estimate(float(second.mean() - first.mean()), float(low), float(high), confidence)


def _arrays(result: BenchmarkResult) -> tuple[np.ndarray, np.ndarray]:
    """Scores, shape `(examples, 1)`, and weights of the examples."""
    scores = np.asarray(list(result.scores.values()), dtype=np.float64)[:, None]
    weights = [result.weights.get(example, 1.0) for example in result.scores]
    return scores, np.asarray(weights, dtype=np.float64)


def _slope(result: BenchmarkResult) -> float:
    """Derivative of the value by the mean of the scores."""
    return result.value if _LIKELIHOODS.get(result.metric) == "exp" else 1.0


def result_of_task(task: str, output: dict) -> BenchmarkResult:
    """The score of a task from the output of the harness.

    Raises:
        ValueError: if it reports no metric that is known here.
        MeasurementError: if the scores of the examples do not add up to what the harness reports.
    """
    reported = {key.split(",")[0]: value for key, value in output["results"][task].items()}
    samples = output["samples"][task]
    better = output.get("higher_is_better", {}).get(task, {})
    others = [name for name in better if name not in METRICS]
    for metric in (*METRICS, *others):
        if metric not in reported or not all(metric in sample for sample in samples):
            continue
        found = _result(task, metric, samples, float(reported[metric]), better.get(metric, metric in METRICS[:4]))
        if found is not None:
            return found
    raise ValueError(
        f"The task {task!r} reports {', '.join(sorted(reported))}, none of which is known here: {METRICS}."
    )


def _result(task: str, metric: str, samples: list[dict], value: float, better: bool) -> BenchmarkResult | None:
    """None if the metric is not the mean of what the examples contribute."""
    scores, weights = {}, {}
    for sample in samples:
        one, example = sample[metric], str(sample["doc_id"])
        if metric in _LIKELIHOODS:
            likelihood, weight = one if isinstance(one, list | tuple) else (one, 1.0)
            unit = math.log(2) if metric == "bits_per_byte" else 1.0
            scores[example], weights[example] = -float(likelihood) / unit, float(weight)
        elif isinstance(one, int | float | np.number):
            scores[example] = float(one)
        else:
            return None
    result = BenchmarkResult(task, metric, scores, value, bool(better), weights if metric in _LIKELIHOODS else {})
    values, counts = _arrays(result)
    mean = values.sum() / counts.sum()
    own = math.exp(mean) if _LIKELIHOODS.get(metric) == "exp" else mean
    if not math.isclose(own, value, rel_tol=1e-4, abs_tol=1e-6):
        if metric not in METRICS:
            return None
        raise MeasurementError(f"The {metric} of {task!r} is {value}, but that of its examples {own}.")
    return result
