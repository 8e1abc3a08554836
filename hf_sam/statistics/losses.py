"""Losses by document in nats, and forgetting, their growth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, interval, over_documents, over_seeds


@dataclass(frozen=True)
class HeldOutLoss:
    """Summed loss and number of predicted tokens of each document.

    Attributes:
        document_losses (`np.ndarray`): nats, fp64, shape `(documents,)`.
        document_tokens (`np.ndarray`): int64, shape `(documents,)`.
    """

    document_losses: np.ndarray
    document_tokens: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.document_tokens.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.document_losses.sum() / self.document_tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if it exceeds the largest float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def interval(self, confidence: float = 0.95) -> Estimate:
        """The loss with its interval over documents."""
        return _mean([self.document_losses], self.document_tokens, confidence)

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "document_losses": self.document_losses.tolist(),
            "document_tokens": self.document_tokens.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "HeldOutLoss":
        """The inverse of `to_dict`."""
        return cls(
            np.asarray(values["document_losses"], dtype=np.float64),
            np.asarray(values["document_tokens"], dtype=np.int64),
        )


def forgetting(before: HeldOutLoss, after: HeldOutLoss, *, confidence: float = 0.95) -> Estimate:
    """Held-out loss after minus before, in nats per token, with its interval over documents, which are paired.

    Args:
        before, after ([`HeldOutLoss`]): of the same documents.
        confidence (`float`, defaults to 0.95): probability of the interval.

    Raises:
        ValueError: if the two were measured on different documents.
    """
    return mean_forgetting([(before, after)], confidence=confidence)


def mean_forgetting(pairs: Sequence[tuple[HeldOutLoss, HeldOutLoss]], *, confidence: float = 0.95) -> Estimate:
    """Forgetting as the mean over training seeds; its interval includes the variation over seeds from two on.

    Args:
        pairs (`Sequence[tuple[HeldOutLoss, HeldOutLoss]]`): losses before and after, a pair for each seed, all of the
            same documents.
        confidence (`float`, defaults to 0.95): probability of the interval.

    Raises:
        ValueError: if they were measured on different documents.
    """
    growth, tokens = growth_by_document(pairs)
    return _mean(list(growth.T), tokens, confidence)


def growth_by_document(pairs: Sequence[tuple[HeldOutLoss, HeldOutLoss]]) -> tuple[np.ndarray, np.ndarray]:
    """Summed growth of the loss of each document, shape `(documents, pairs)`, and its tokens, shape `(documents,)`.

    Raises:
        ValueError: if the pairs were measured on different documents.
    """
    first = pairs[0][0]
    for loss in (loss for pair in pairs for loss in pair):
        check_same_documents(first, loss)
    growth = np.stack([after.document_losses - before.document_losses for before, after in pairs], axis=1)
    return growth, first.document_tokens


def _mean(sums: Sequence[np.ndarray], tokens: np.ndarray, confidence: float) -> Estimate:
    by_seed = np.asarray([one.sum() / tokens.sum() for one in sums])
    variations = [over_documents(np.mean(sums, axis=0)[:, None], tokens)]
    if len(sums) > 1:
        variations.append(over_seeds(by_seed[:, None]))
    return interval(by_seed.mean(), [1.0], variations, confidence)


def check_same_documents(before: HeldOutLoss, after: HeldOutLoss) -> None:
    """Raises ValueError if two losses cannot be compared document by document."""
    if not np.array_equal(before.document_tokens, after.document_tokens):
        raise ValueError(
            f"The two losses were measured on different tokens ({len(before.document_tokens)} documents of "
            f"{before.tokens} tokens, and {len(after.document_tokens)} of {after.tokens}). Measure both models on the "
            "same data with the same tokenizer and max_length."
        )
