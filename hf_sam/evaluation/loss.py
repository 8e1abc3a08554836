"""Held-out loss in nats per token, by document, and forgetting: how much it grew.

The loss is the sum over all tokens divided by their number, whatever the batches, the padding and the processes; a mean
of batch means would weigh tokens by the length of their neighbours.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from .data import IGNORED, Batch, HeldOutData, batches_of, model_inputs, shared_batches
from .estimate import Estimate, ratio_interval
from .measuring import device_of, logits_of, measuring
from .processes import largest, total

# Logits are turned into fp32 (and for the KL divergence fp64) this many at a time.
CHUNK_LOGITS = 1 << 25


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
        """exp(loss); infinite where that is beyond the largest float."""
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


def held_out_loss(model: torch.nn.Module, data, *, batch_size: int = 8) -> HeldOutLoss:
    """The loss of a causal language model on held-out documents.

    Under several processes the batches are shared out, and all of them get the whole result.

    Args:
        model (`torch.nn.Module`): returns logits of shape `(rows, length, vocabulary)`; may be wrapped (DDP), sharded
            (FSDP2, ZeRO) or quantized.
        data ([`HeldOutData`], `torch.utils.data.DataLoader`, or rows with `input_ids`): what to measure on.
        batch_size (`int`, defaults to 8): rows a batch, for data that is not in batches.

    Raises:
        ValueError: if the data holds no token to predict.
        FloatingPointError: if the loss of a document is not a number.
    """
    with measuring(model) as inner, torch.no_grad():
        losses = TokenSums()
        for batch, counts in shared_batches(data, batch_size, "held-out loss"):
            losses.add(batch, token_losses(inner, batch), counts)
    result = HeldOutLoss(*losses.totals())
    if not np.isfinite(result.document_losses).all():
        broken = int(np.flatnonzero(~np.isfinite(result.document_losses))[0])
        raise FloatingPointError(
            f"The loss of document {broken} is {result.document_losses[broken]}: the model's logits are not finite."
        )
    return result


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


class TokenSums:
    """Sums of a number per token by document, over all processes."""

    def __init__(self):
        self._sums = np.zeros(0)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, batch: Batch, values: torch.Tensor, counts: bool = True) -> None:
        """Add one number for each counted token of a batch, in their order; `counts=False` adds nothing."""
        self._reach(int(batch.documents.max()) + 1)
        if counts:
            documents = batch.documents[:, 1:][batch.labels[:, 1:] != IGNORED].cpu().numpy()
            np.add.at(self._sums, documents, values.cpu().double().numpy())
            np.add.at(self._counts, documents, 1)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (fp64) and numbers of tokens by document.

        Raises:
            ValueError: if no token was counted.
        """
        self._reach(largest(len(self._sums)))
        sums, counts = total(self._sums), total(self._counts)
        if not counts.sum():
            raise ValueError("The held-out data has no token to predict: check the split, and its labels.")
        return sums, counts

    def _reach(self, documents: int):
        missing = max(0, documents - len(self._sums))
        self._sums = np.pad(self._sums, (0, missing))
        self._counts = np.pad(self._counts, (0, missing))


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Losses of the counted tokens of a batch in nats, fp32 (fp64 if the logits are), shape `(tokens,)`."""
    logits, targets = counted_logits(model, batch)
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([cross_entropy(at_least_fp32(piece), target, reduction="none") for piece, target in pieces])


def counted_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the counted tokens, shape `(tokens, vocabulary)`, and the tokens themselves, shape `(tokens,)`."""
    device = device_of(model)
    logits = logits_of(model(**model_inputs(model, batch, device)))[:, :-1]
    labels = batch.labels[:, 1:].to(logits.device)
    counted = labels != IGNORED
    return logits[counted], labels[counted]


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """fp32, unless it is fp64 already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the losses of a batch in nats, shape `()`, with its graph."""
    return token_losses(model, batch).sum()


def count_tokens(data, batch_size: int) -> int:
    """Number of tokens that count, in all of the data.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(data, HeldOutData):
        return data.tokens
    tokens = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches_of(data, batch_size))
    if not tokens:
        raise ValueError("The held-out data has no token to predict: check the split, and its labels.")
    return tokens
