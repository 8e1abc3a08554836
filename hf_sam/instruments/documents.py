"""Held-out documents as batches that record the document of each token.

Instruments sum over tokens and report by document. Their results do not depend on how documents are cut, padded, packed
and sharded.
"""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..runtime.fingerprint import fingerprint
from ..runtime.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, and the tokens that it should predict.

    Attributes:
        inputs (`dict[str, torch.Tensor]`): arguments of the model's forward pass, without labels.
        labels (`torch.Tensor`): shape `(rows, length)`; the token at each position if it counts, else -100. The
            first token of a document never counts.
        documents (`torch.Tensor`): shape `(rows, length)`; index of the document of each token.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    documents: torch.Tensor


@dataclass(frozen=True)
class Row:
    """A document, or a piece of one; the token `input_ids[i]` counts if `labels[i]` is not -100."""

    input_ids: list[int]
    labels: list[int]
    document: int


class HeldOutData:
    """Tokenized documents, cut into rows of at most `max_length` tokens.

    Rows of one document overlap by one token, so that each token but the first of a document is predicted once.

    Args:
        rows (`Sequence[Mapping]`): `input_ids`, one document a row, and optionally `labels` (-100 where a token does
            not count) and `attention_mask` (tokens with 0 are dropped). Packed rows with `seq_lengths` (TRL's) or with
            `position_ids` that start again at 0 are taken apart into their documents.
        max_length (`int`, *optional*): longest row; whole documents when omitted.
        pad_token_id (`int`, defaults to 0): fills up shorter rows; the model does not attend to it.

    Raises:
        ValueError: if there are no rows, or no token to predict, or `input_ids` is missing.
    """

    def __init__(self, rows: Iterable, *, max_length: int | None = None, pad_token_id: int = 0):
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} leaves nothing to predict; it must be 2 or larger.")
        self.pad_token_id = pad_token_id
        self.rows: list[Row] = []
        self.documents = 0
        for row in rows:
            if "input_ids" not in row:
                raise ValueError(
                    f"Held-out rows need a column 'input_ids', but have {sorted(row)}. Tokenize text with "
                    "HeldOutData.from_dataset(dataset, tokenizer, column=...)."
                )
            for ids, labels in _unpacked(row, *_unpadded(row)):
                self.rows.extend(_cut(ids, labels, max_length, self.documents))
                self.documents += 1
        if not self.documents:
            raise ValueError("The held-out data is empty: check the split, and what filters it.")
        if not self.rows:
            raise ValueError(
                f"None of the {self.documents} held-out documents has a token to predict: each is shorter than two "
                "tokens, or all of its labels are -100."
            )

    @classmethod
    def from_dataset(
        cls,
        dataset,
        tokenizer,
        *,
        column: str = "text",
        max_length: int = 1024,
        max_documents: int | None = None,
    ) -> "HeldOutData":
        """Tokenize a dataset, one document a row.

        Args:
            dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list`): rows with the text in `column`, or
                with `prompt` and `completion` (only the completion counts), or with `messages` (the tokenizer's chat
                template is applied; only the assistant counts if the template marks it); or a list of strings.
            tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
            column (`str`, defaults to `"text"`): name of the column of text, or `"messages"`, or `"completion"`.
            max_length (`int`, defaults to 1024): longest row, in tokens; longer documents take several.
            max_documents (`int`, *optional*): use only the first ones.

        Raises:
            ValueError: if the column is missing or not of the right type, or there is nothing in it.
        """
        rows = islice_rows(dataset, max_documents)
        kind = list if column == "messages" else str
        texts: list[Any] = [
            row if isinstance(row, str) else _field(row, column, i, kind) for i, row in enumerate(rows, start=1)
        ]
        if column == "completion":
            prompts = [_field(row, "prompt", i, str) for i, row in enumerate(rows, start=1)]
            encoded = [_completion(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        elif column == "messages":
            encoded = [_chat(tokenizer, messages) for messages in texts]
        else:
            encoded = _tokenized(tokenizer, texts)
        pad = tokenizer.pad_token_id
        return cls(encoded, max_length=max_length, pad_token_id=0 if pad is None else pad)

    def first(self, documents: int) -> "HeldOutData":
        """The first documents of this data."""
        part = copy.copy(self)
        part.rows = [row for row in self.rows if row.document < documents]
        part.documents = min(documents, self.documents)
        if not part.rows:
            raise ValueError(f"The first {documents} held-out documents have no token to predict.")
        return part

    def sample(self, rows: int, parts: int, seed: int = 0) -> list["HeldOutData"]:
        """`parts` disjoint groups of `rows` random rows.

        Raises:
            ValueError: if there are too few rows.
        """
        if rows < 1 or parts < 1:
            raise ValueError(f"{parts} batches of {rows} rows cannot be taken; both must be 1 or larger.")
        if len(self.rows) < rows * parts:
            raise ValueError(
                f"The data has {len(self.rows)} rows, but {parts} batches of {rows} rows need {rows * parts}. Take "
                "more documents, fewer or smaller batches, or shorter rows."
            )
        chosen = random.Random(seed).sample(self.rows, rows * parts)
        found = []
        for start in range(0, len(chosen), rows):
            part = copy.copy(self)
            part.rows = chosen[start : start + rows]
            found.append(part)
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens to predict."""
        return sum(label != IGNORE_INDEX for row in self.rows for label in row.labels)

    @property
    def largest_token(self) -> int:
        """The largest token id; the model must have more embeddings."""
        return max(max(row.input_ids) for row in self.rows)

    def fingerprint(self) -> str:
        """Fingerprint of all tokens and labels and of how they are cut into rows."""
        numbers = [part for row in self.rows for part in (row.input_ids, row.labels, [row.document])]
        return fingerprint(b"".join(np.asarray(part, dtype=np.int64).tobytes() + b";" for part in numbers))

    def batches(self, batch_size: int = 8, padding_side: str = "right") -> list["Batch"]:
        """All rows in batches of similar length, the longest first, so that out-of-memory errors come early."""
        order = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i].input_ids))
        return [
            self._padded([self.rows[i] for i in order[start : start + batch_size]], padding_side)
            for start in range(0, len(order), batch_size)
        ]

    def _padded(self, rows: list[Row], side: str) -> Batch:
        length = max(len(row.input_ids) for row in rows)

        def stack(values: list[list[int]], fill: int) -> torch.Tensor:
            fills = [[fill] * (length - len(value)) for value in values]
            pairs = zip(values, fills, strict=True)
            return torch.tensor([value + rest if side == "right" else rest + value for value, rest in pairs])

        ids = stack([row.input_ids for row in rows], self.pad_token_id)
        mask = stack([[1] * len(row.input_ids) for row in rows], 0)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=stack([row.labels for row in rows], IGNORE_INDEX),
            documents=torch.tensor([row.document for row in rows])[:, None].expand_as(ids),
        )


def islice_rows(dataset, max_documents: int | None) -> Sequence:
    """The first rows of a dataset or of a stream.

    Raises:
        ValueError: for a stream without `max_documents`.
    """
    if not hasattr(dataset, "__len__"):
        if max_documents is None:
            raise ValueError("A streamed dataset needs max_documents: how many of its documents to measure on.")
        return [row for row, _ in zip(dataset, range(max_documents), strict=False)]
    count = len(dataset) if max_documents is None else min(max_documents, len(dataset))
    return [dataset[i] for i in range(count)]


def _field(row, column: str, number: int, kind: type):
    if column not in row:
        raise ValueError(
            f"The held-out data has no column {column!r}; its columns are {', '.join(map(repr, row))}. Name one with "
            "column=... (on the command line: --data_column)."
        )
    value = row[column]
    if not isinstance(value, kind):
        holds = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
        wanted = "text" if kind is str else "a list of messages"
        raise ValueError(
            f"Row {number} of the held-out data has {holds} in the column {column!r}, which must hold {wanted}. Mend "
            "or remove the row."
        )
    return value


def _tokenized(tokenizer, texts: list[str]) -> list[dict]:
    if not texts:
        return []
    # Tokenizers warn about rows that are longer than the model's context; here they are cut afterwards.
    encoded = tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return [{"input_ids": ids} for ids in encoded]


def _chat(tokenizer, messages) -> dict:
    """One conversation; if the template marks the turns of the assistant, only they count."""
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template to turn 'messages' into text with.")
    marked = "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
    )
    if not marked:
        return {"input_ids": encoded["input_ids"]}
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return {"input_ids": encoded["input_ids"], "labels": [i if said else IGNORE_INDEX for i, said in pairs]}


def _completion(tokenizer, prompt: str, completion: str) -> dict:
    prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
    ids = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
    return {"input_ids": [*prompt_ids, *ids], "labels": [IGNORE_INDEX] * len(prompt_ids) + ids}


def _unpadded(row) -> tuple[list[int], list[int]]:
    ids, labels, mask = (None if row.get(name) is None else np.asarray(row[name]) for name in _ROW)
    labels = ids if labels is None else labels
    if len(labels) != len(ids):
        raise ValueError(f"A held-out row has {len(ids)} input_ids, but {len(labels)} labels.")
    if mask is not None:
        ids, labels = ids[mask.astype(bool)], labels[mask.astype(bool)]
    return ids.tolist(), labels.tolist()


def _unpacked(row, ids: list[int], labels: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The documents of a row; `seq_lengths` (TRL) or `position_ids` mark those of a packed row."""
    starts = [0]
    if row.get("seq_lengths") is not None:
        starts = [0, *np.cumsum(np.asarray(row["seq_lengths"])).tolist()[:-1]]
    elif row.get("position_ids") is not None and row.get("attention_mask") is None:
        starts = np.flatnonzero(np.asarray(row["position_ids"]) == 0).tolist() or [0]
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield ids[start:stop], labels[start:stop]


_ROW = ("input_ids", "labels", "attention_mask")


def _cut(ids: list[int], labels: list[int], max_length: int | None, document: int) -> Iterator[Row]:
    step = max(1, len(ids) - 1) if max_length is None else max_length - 1
    for start in range(0, max(1, len(ids) - 1), step):
        piece = labels[start : start + step + 1]
        counted = [IGNORE_INDEX, *piece[1:]]  # the first token is the context of the second
        if any(label != IGNORE_INDEX for label in counted):
            yield Row(ids[start : start + step + 1], counted, document)
