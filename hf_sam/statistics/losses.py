"""Losses by document in nats, and forgetting, their growth."""

import math
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, ratio_interval


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

    def interval(self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Estimate:
        """The loss with its bootstrap interval over documents."""
        return ratio_interval(self.document_losses, self.document_tokens, confidence, resamples, seed)

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


def forgetting(
    before: HeldOutLoss, after: HeldOutLoss, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Held-out loss after minus before, in nats per token, with the paired bootstrap interval over documents.

    Args:
        before, after ([`HeldOutLoss`]): of the same documents.
        confidence (`float`, defaults to 0.95): probability of the interval.
        resamples (`int`, defaults to 1000): resamples of the documents.
        seed (`int`, defaults to 0): seed of the resampling.

    Raises:
        ValueError: if the two were measured on different documents.
    """
    check_same_documents(before, after)
    difference = after.document_losses - before.document_losses
    return ratio_interval(difference, before.document_tokens, confidence, resamples, seed)


def check_same_documents(before: HeldOutLoss, after: HeldOutLoss) -> None:
    """Raises ValueError if two losses cannot be compared document by document."""
    if not np.array_equal(before.document_tokens, after.document_tokens):
        raise ValueError(
            f"The two losses were measured on different tokens ({len(before.document_tokens)} documents of "
            f"{before.tokens} tokens, and {len(after.document_tokens)} of {after.tokens}). Measure both models on the "
            "same data with the same tokenizer and max_length."
        )
