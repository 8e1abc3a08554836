"""Estimates with bootstrap intervals over documents (Efron 1979; percentile interval).

The bootstrap resamples documents, because the tokens of a document are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Resamples that are in memory at one time.
_AT_ONCE = 50


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval.

    Attributes:
        value (`float`): the estimate from all documents.
        low, high (`float`): ends of the interval.
        confidence (`float`): e.g. 0.95.
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def __str__(self):
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "confidence": self.confidence}


def resampled_sums(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over resampled documents, drawn with replacement; the same documents for all columns.

    Args:
        values (`np.ndarray`): shape `(documents, columns)`.
        resamples (`int`): how often to draw.
        seed (`int`): seed of the draws.

    Returns:
        `np.ndarray`: shape `(resamples, columns)`.
    """
    generator = np.random.default_rng(seed)
    documents = len(values)
    sums = []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=count)
        sums.append(drawn @ values)
    return np.concatenate(sums)


def interval(value: float, resampled: np.ndarray, confidence: float, documents: int) -> Estimate:
    """The percentile interval of `resampled` values around `value`; nan for a single document.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, e.g. 0.95.")
    if documents < 2:
        return Estimate(float(value), math.nan, math.nan, confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), confidence)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; nan for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, confidence: float, resamples: int, seed: int
) -> Estimate:
    """Sum of numerators over sum of denominators, both by document, with its interval."""
    value = numerators.sum() / denominators.sum()
    above, below = resampled_sums(np.stack([numerators, denominators], axis=1), resamples, seed).T
    # A resample may draw documents without a token only.
    ratios = np.divide(above, below, out=np.full(resamples, value), where=below > 0)
    return interval(value, ratios, confidence, len(numerators))
