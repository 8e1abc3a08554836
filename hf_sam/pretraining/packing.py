"""Packing: documents are concatenated and cut into rows of equal length. No token is lost or repeated.

A row is a slice of the tokens of the whole dataset, so nothing is copied. The last row is padded. The result does not
depend on the number of tokenization processes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ..runtime.labels import IGNORE_INDEX
from .documents import TextSource, check_text, token_ids
from .repetition import is_repetitive


def make_row(
    tokens: np.ndarray,
    starts: np.ndarray,
    length: int,
    padding: int,
    document_mask: bool,
    mask_repetitive: bool = False,
) -> dict:
    """Make the model inputs of a row.

    Args:
        tokens (`np.ndarray` of shape `(n,)`): at most `length` tokens.
        starts (`np.ndarray` of shape `(n,)`): marks the first token of each document.
        length (`int`): tokens per row.
        padding (`int`): padding token; it is not predicted.
        document_mask (`bool`): mask attention between documents. Position ids then restart at each document, which is
            how transformers detects packed documents, and the first token of a document is not predicted.
        mask_repetitive (`bool`): predict no token of a row that [`is_repetitive`].

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `labels` and, with `document_mask`, `position_ids`, all of shape
        `(length,)`. Padding comes last, so causal attention needs no mask for it.
    """
    ids = np.full(length, padding, dtype=np.int64)
    ids[: len(tokens)] = tokens
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    if not (mask_repetitive and is_repetitive(tokens)):
        labels[: len(tokens)] = tokens
    row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if document_mask:
        begins = np.zeros(length, dtype=bool)
        begins[: len(tokens)] = starts
        begins[len(tokens) : len(tokens) + 1] = True  # padding is a document of its own
        labels[begins] = IGNORE_INDEX
        begins[0] = True
        place = np.arange(length)
        row["position_ids"] = torch.from_numpy(place - np.maximum.accumulate(np.where(begins, place, 0)))
    return row


def tokenized(source: TextSource, tokenizer, workers: int = 1):
    """Tokenize all documents of a source into an int32 column `input_ids`; the result is cached by `datasets`.

    Args:
        source ([`TextSource`]): source of the documents.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with an end-of-text token.
        workers (`int`): number of processes.

    Raises:
        ValueError: if the data or the column does not exist, or a document is not a string.
    """
    import datasets

    dataset = source.open(streaming=False)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return dataset.map(
        _to_tokens,
        batched=True,
        input_columns=[source.column],
        fn_kwargs={"tokenizer": tokenizer, "column": source.column},
        remove_columns=dataset.column_names,
        features=features,
        num_proc=workers if workers > 1 and len(dataset) > workers else None,
        desc=f"Tokenizing {source.name}",
    )


def _to_tokens(texts, tokenizer, column):
    for text in texts:
        check_text(text, column, "a document")
    return {"input_ids": token_ids(texts, tokenizer)}


class PackedRows(Dataset):
    """Packed rows of tokenized documents: row `i` starts at token `i * length` of the concatenated documents.

    Args:
        documents (`datasets.Dataset`): result of [`tokenized`].
        length (`int`): tokens per row.
        padding (`int`): padding token of the last row.
        document_mask, mask_repetitive (`bool`): see [`make_row`].
    """

    def __init__(
        self, documents, length: int, padding: int, document_mask: bool = False, mask_repetitive: bool = False
    ):
        self._documents = documents
        self.length, self._padding = length, padding
        self._masks = document_mask, mask_repetitive
        self._open()

    def _open(self):
        chunks = self._documents.data.column("input_ids").chunks
        # Memory-mapped, not copied.
        self._pieces = [chunk.flatten().to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() - chunk.offsets[0].as_py() for chunk in chunks if len(chunk)]
        self._pieces = [piece for piece, chunk in zip(self._pieces, chunks, strict=True) if len(chunk)]
        self._ends = np.cumsum([len(piece) for piece in self._pieces], dtype=np.int64)

    def __getstate__(self):
        # Each dataloader worker maps the files again.
        return {key: value for key, value in vars(self).items() if key not in ("_pieces", "_offsets", "_ends")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self):
        return -(-self.tokens // self.length)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin, end = index * self.length, min((index + 1) * self.length, self.tokens)
        tokens, starts = [], []
        piece = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[piece]) - len(self._pieces[piece])
            part = slice(begin - first, min(end - first, len(self._pieces[piece])))
            tokens.append(self._pieces[piece][part])
            starts.append(self._starts(piece, part))
            begin = first + part.stop
            piece += 1
        return make_row(np.concatenate(tokens), np.concatenate(starts), self.length, self._padding, *self._masks)

    def _starts(self, piece: int, part: slice) -> np.ndarray:
        offsets = self._offsets[piece]
        found = offsets[np.searchsorted(offsets, part.start) : np.searchsorted(offsets, part.stop)]
        starts = np.zeros(part.stop - part.start, dtype=bool)
        starts[found - part.start] = True
        return starts


class Mixture:
    """A mixture of several sources, exact (up to rounding to rows) in every block of `block` rows.

    Args:
        weights (`Sequence[float]`): fractions of the tokens from each source; need not sum to 1.
        block (`int`): rows per block.
        seed (`int`): seed of the order within blocks.

    Raises:
        ValueError: if a weight is not positive, or too small for one row per block.
    """

    def __init__(self, weights: Sequence[float], block: int = 1024, seed: int = 0):
        if not all(np.isfinite(weights)) or min(weights) <= 0:
            raise ValueError(f"dataset_weights={list(weights)} must be positive numbers.")
        self.block, self.seed = block, seed
        self.shares = np.asarray(weights, dtype=float) / sum(weights)
        self.counts = self._counts()
        if min(self.counts) == 0:
            raise ValueError(
                f"dataset_weights={list(weights)}: {min(self.shares):.2g} of {block} rows is less than one row. Raise "
                "the smallest weight, or remove that dataset."
            )

    def _counts(self) -> list[int]:
        """Rows from each source in a block."""
        exact = self.shares * self.block
        counts = np.floor(exact).astype(int)
        most = np.argsort(counts - exact, kind="stable")  # the largest remainders first
        counts[most[: self.block - counts.sum()]] += 1
        return counts.tolist()

    def order(self, number: int, rows: int) -> np.ndarray:
        """Permutation of the rows of block `number`; rows are numbered source by source."""
        return np.random.default_rng((self.seed, number)).permutation(rows)

    def taken(self, source: int, rows: int) -> int:
        """Number of rows from a source among the first `rows` rows."""
        blocks, rest = divmod(rows, self.block)
        return blocks * self.counts[source] + int((self.sources(blocks)[:rest] == source).sum())

    def sources(self, number: int) -> np.ndarray:
        """Source of each row of block `number`."""
        labels = np.repeat(np.arange(len(self.shares)), self.counts)
        return labels[self.order(number, self.block)]


class MixedRows(Dataset):
    """Packed rows of several sources in the order of training.

    Each source is shuffled in every pass over it. Row `i` does not depend on the number of rows.

    Args:
        parts (`Sequence[PackedRows]`): the sources.
        mixture ([`Mixture`]): the mixture of the sources.
        first (`int`): first row of the dataset; negative if the first rows are never read.
        rows (`int`): number of rows.
        passes (`int`): maximum number of passes over a source.
        names (`Sequence[str]`): names of the sources, for messages.

    Raises:
        ValueError: if a source has too few rows; the message says how many passes the run would need.
    """

    def __init__(
        self,
        parts: Sequence[PackedRows],
        mixture: Mixture,
        *,
        first: int = 0,
        rows: int,
        passes: int = 1,
        names: Sequence[str] = (),
    ):
        self._parts, self._mixture, self._first, self._rows = parts, mixture, first, rows
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._sources: tuple[int, np.ndarray] | None = None
        for index, part in enumerate(parts):
            name = names[index] if names else str(index)
            if not len(part):
                raise ValueError(f"The training data {name!r} contains only empty documents.")
            needed = mixture.taken(index, first + rows)
            if needed > passes * len(part):
                raise ValueError(
                    f"The training data {name!r} has {part.tokens:,} tokens, but the run takes "
                    f"{needed * part.length:,} of it: {needed / len(part):.1f} passes. Lower train_tokens, raise "
                    "num_train_epochs (maximum number of passes), or add data."
                )

    def __len__(self):
        return self._rows

    def __getitem__(self, index: int) -> dict:
        number, place = divmod(self._first + index, self._mixture.block)
        sources = self._block(number)
        source = int(sources[place])
        count = number * self._mixture.counts[source] + int((sources[:place] == source).sum())
        part = self._parts[source]
        turn, row = divmod(count, len(part))
        return part[int(self._order(source, turn, len(part))[row])]

    def _block(self, number: int) -> np.ndarray:
        if self._sources is None or self._sources[0] != number:
            self._sources = number, self._mixture.sources(number)
        return self._sources[1]

    def _order(self, source: int, turn: int, rows: int) -> np.ndarray:
        if (source, turn) not in self._orders:
            self._orders.pop((source, turn - 2), None)
            self._orders[source, turn] = np.random.default_rng((self._mixture.seed, source, turn)).permutation(rows)
        return self._orders[source, turn]
