"""Held-out loss in nats per token, by document.

The loss is the sum over all tokens divided by their number, for any batches, padding and number of processes. A mean of
batch means would weight tokens by the length of the other rows in their batch.
"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ..runtime.distributed import all_reduce_max, all_reduce_sum_array
from ..runtime.labels import IGNORE_INDEX
from ..statistics.losses import HeldOutLoss
from .batches import batches_of, model_inputs, shared_batches
from .documents import Batch, HeldOutData
from .measuring import device_of, logits_of, measuring
from .registry import Instrument, register

# Logits are converted to fp32 (for the KL divergence to fp64) in pieces of this size.
CHUNK_LOGITS = 1 << 25


def held_out_loss(model: torch.nn.Module, data, *, batch_size: int = 8) -> HeldOutLoss:
    """The loss of a causal language model on held-out documents.

    Several processes share the batches, and each gets the whole result.

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


class TokenSums:
    """Sums by document of one number per token, over all processes."""

    def __init__(self):
        self._sums = np.zeros(0)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, batch: Batch, values: torch.Tensor, counts: bool = True) -> None:
        """Add one number for each counted token of a batch, in order; `counts=False` adds nothing."""
        self._reach(int(batch.documents.max()) + 1)
        if counts:
            documents = batch.documents[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX].cpu().numpy()
            np.add.at(self._sums, documents, values.cpu().double().numpy())
            np.add.at(self._counts, documents, 1)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (fp64) and numbers of tokens by document.

        Raises:
            ValueError: if no token was counted.
        """
        self._reach(all_reduce_max(len(self._sums)))
        sums, counts = all_reduce_sum_array(self._sums), all_reduce_sum_array(self._counts)
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
    counted = labels != IGNORE_INDEX
    return logits[counted], labels[counted]


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """fp32, unless it is fp64 already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the losses of a batch in nats, shape `()`, with its graph."""
    return token_losses(model, batch).sum()


def count_tokens(data, batch_size: int) -> int:
    """Number of counted tokens in the data.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(data, HeldOutData):
        return data.tokens
    tokens = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches_of(data, batch_size))
    if not tokens:
        raise ValueError("The held-out data has no token to predict: check the split, and its labels.")
    return tokens


register(
    Instrument(
        name="loss",
        help="held-out loss of each model and variant on each dataset",
        measure=lambda model, data, *, batch_size, tokenizer: held_out_loss(
            model, data, batch_size=batch_size
        ).to_dict(),
        selected=lambda settings: True,
        subject="variant",
        depends_on=(),
        per_dataset=True,
    )
)
