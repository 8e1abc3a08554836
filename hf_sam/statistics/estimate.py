"""Estimates with confidence intervals from the sources of their variation, e.g. documents and training seeds.

Each source gives a covariance with its degrees of freedom. Intervals are Student's t with the degrees of freedom of
Welch and Satterthwaite; the interval of a ratio is that of Fieller (1954).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.packages import require

# Leave out one of this many groups of documents at a time; each document alone where there are fewer.
_GROUPS = 200

# Documents of equal length that those of a dataset must weigh as much as, for an interval: at least so many, and so
# many times the root of their number. Below, long documents decide, and a sample holds too few of the longest.
MIN_EFFECTIVE, MIN_EFFECTIVE_ROOT = 3.0, 0.6


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval.

    Attributes:
        value (`float`): the estimate.
        low, high (`float`): ends of the interval; nan if there is none.
        confidence (`float`): e.g. 0.95.
        problem (`str`): why there is no interval; empty if there is one.
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95
    problem: str = ""

    def __str__(self):
        return self.text(".4f")

    def text(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        """The value with its interval, for a table.

        Args:
            form (`str`): of the numbers, e.g. `"+.1f"`.
            scale (`float`, defaults to 1.0): factor, e.g. 100 for per cent.
            unit (`str`): behind the value, e.g. `"%"`.
        """
        # Without the sign of a zero.
        form = f"{form[0]}z{form[1:]}" if form[0] in "+-" else f"z{form}"
        value = f"{scale * self.value:{form}}{unit}"
        if self.problem:
            return f"{value} [no interval]"
        return f"{value} [{scale * self.low:{form}}, {scale * self.high:{form}}]"

    def scaled(self, factor: float) -> "Estimate":
        """The estimate in another unit, e.g. times 100 in per cent, or of the opposite sign."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.value, low, high, self.confidence, self.problem)

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict) -> "Estimate":
        """The inverse of `to_dict`, also of a record whose numbers that are not finite are None."""
        numbers = {name: math.nan if value is None else value for name, value in values.items()}
        return cls(**numbers)


@dataclass(frozen=True)
class Variation:
    """How much one source of variation moves a vector of `size` estimates.

    Attributes:
        source (`str`): e.g. `"documents"`, for messages.
        covariance (`np.ndarray`): of the estimates, shape `(size, size)`.
        degrees (`float`): degrees of freedom of the covariance; infinite if it is known.
        problem (`str`): why it cannot be relied on; empty if it can.
    """

    source: str
    covariance: np.ndarray
    degrees: float
    problem: str = ""


def over_documents(
    sums: np.ndarray,
    tokens: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    source: str = "documents",
) -> Variation:
    """Variation over documents, by a jackknife that weights each document by its share of the tokens.

    The jackknife of documents of different lengths multiplies the square of each change by 1 minus the share of the
    document (HC2; MacKinnon and White 1985), which for equal lengths is the factor (n - 1) / n. A few long documents
    make an estimate of the variance uncertain: its degrees of freedom are (sum T^2)^2 / sum T^4 (Satterthwaite 1946).

    Args:
        sums (`np.ndarray`): sums over the tokens of each document, shape `(documents, columns)`.
        tokens (`np.ndarray`): tokens of each document, shape `(documents,)`.
        statistic (`Callable[[np.ndarray], np.ndarray]`, *optional*): the estimates, shape `(size,)`, from the means
            per token, shape `(columns,)`; the means themselves when omitted.
        source (`str`): for messages.
    """
    counted = tokens > 0
    sums, tokens = sums[counted], tokens[counted].astype(np.float64)
    documents = len(tokens)
    if statistic is not None and len(tokens) > _GROUPS:
        # Shuffled, because neighbouring documents may be alike.
        groups = np.random.default_rng(0).permutation(len(tokens)) % _GROUPS
        sums = np.stack([np.bincount(groups, column, _GROUPS) for column in sums.T], axis=1)
        tokens = np.bincount(groups, tokens, _GROUPS)
    share = tokens / tokens.sum()
    effective = float(np.square(np.square(share).sum()) / (share**4).sum())
    problem = ""
    if effective < max(MIN_EFFECTIVE, MIN_EFFECTIVE_ROOT * math.sqrt(len(tokens))):
        problem = (
            f"the {documents} {source} weigh like {effective:.1f} of equal length, which is too few; measure more "
            "of them, or cut long ones with max_length"
        )
    if len(tokens) < 2:
        size = sums.shape[1] if statistic is None else len(statistic(sums.sum(0) / tokens.sum()))
        return Variation(source, np.full((size, size), math.nan), 0.0, problem)
    left = (sums.sum(0) - sums) / (tokens.sum() - tokens)[:, None]
    mean = sums.sum(0) / tokens.sum()
    changes = left - mean
    if statistic is not None:
        changes = np.stack([statistic(means) for means in left]) - statistic(mean)
    covariance = (changes * (1 - share)[:, None]).T @ changes
    return Variation(source, covariance, min(effective, len(tokens) - 1), problem)


def over_seeds(estimates: np.ndarray) -> Variation:
    """Variation of the mean over training seeds.

    Args:
        estimates (`np.ndarray`): of each seed, shape `(seeds, size)`.
    """
    seeds = len(estimates)
    if seeds < 2:
        raise ValueError("The variation over seeds needs two seeds or more.")
    deviations = estimates - estimates.mean(0)
    return Variation("seeds", deviations.T @ deviations / (seeds - 1) / seeds, seeds - 1)


def interval(value: float, contrast: Sequence[float], variations: Sequence[Variation], confidence: float) -> Estimate:
    """The t-interval of a linear combination of the estimates.

    Args:
        value (`float`): the combination.
        contrast (`Sequence[float]`): its coefficients, shape `(size,)`.
        variations (`Sequence[Variation]`): the independent sources of variation.
        confidence (`float`): e.g. 0.95.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    if problem := _problem(variations):
        return Estimate(float(value), math.nan, math.nan, confidence, problem)
    half = _quantile(contrast, variations, confidence) * math.sqrt(_variance(contrast, variations))
    return Estimate(float(value), float(value - half), float(value + half), confidence)


def ratio(numerator: float, denominator: float, variations: Sequence[Variation], confidence: float) -> Estimate:
    """A ratio of two estimates with the interval of Fieller (1954), which holds for negative numerators, too.

    Args:
        numerator, denominator (`float`): the two estimates, in this order in the covariances.
        variations (`Sequence[Variation]`): the independent sources of variation; covariances of shape `(2, 2)`.
        confidence (`float`): e.g. 0.95.

    Returns:
        [`Estimate`]: without an interval if the denominator may be zero, where the interval would be unbounded.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    value = numerator / denominator if denominator else math.nan
    problem = _problem(variations)
    if not problem and denominator:
        contrast = (1.0, -value)
        square = _quantile(contrast, variations, confidence) ** 2
        covariance = sum(variation.covariance for variation in variations)
        a = denominator**2 - square * covariance[1, 1]
        b = numerator * denominator - square * covariance[0, 1]
        c = numerator**2 - square * covariance[0, 0]
        if a > 0:
            root = math.sqrt(max(b * b - a * c, 0.0))
            return Estimate(float(value), float((b - root) / a), float((b + root) / a), confidence)
    problem = problem or "what it is relative to may be zero, within its own interval; measure more documents or seeds"
    return Estimate(float(value), math.nan, math.nan, confidence, problem)


def check_confidence(confidence: float) -> None:
    """Raises ValueError unless a confidence is between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, e.g. 0.95.")


def _problem(variations: Sequence[Variation]) -> str:
    return next((variation.problem for variation in variations if variation.problem), "")


def _variance(contrast: Sequence[float], variations: Sequence[Variation]) -> float:
    return float(sum(_parts(contrast, variations)))


def _parts(contrast: Sequence[float], variations: Sequence[Variation]) -> list[float]:
    c = np.asarray(contrast, dtype=np.float64)
    return [max(float(c @ variation.covariance @ c), 0.0) for variation in variations]


def _quantile(contrast: Sequence[float], variations: Sequence[Variation], confidence: float) -> float:
    """Quantile of Student's t, with the degrees of freedom of Welch and Satterthwaite."""
    parts = _parts(contrast, variations)
    denominator = sum(part**2 / variation.degrees for part, variation in zip(parts, variations, strict=True))
    degrees = sum(parts) ** 2 / denominator if denominator else math.inf
    require("scipy", "A confidence interval")
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, max(degrees, 1.0)))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; nan for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
