"""Text as a stream of tokens that can be resumed at the exact token."""

import copy
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..runtime.dataset_specs import data_files, open_split, parse_spec
from ..runtime.packages import require

# Documents per tokenization batch, and files that are open at the same time.
_BATCH = 64
_OPEN = 8


@dataclass(frozen=True)
class TextSource:
    """A dataset with a text column.

    Attributes:
        spec (`str`): `[NAME=]PLACE`, see [`~hf_sam.runtime.dataset_specs.open_split`].
        column (`str`): name of the text column.
        split (`str` or `None`): the split; `train`, or else the first split, when omitted.
    """

    spec: str
    column: str = "text"
    split: str | None = None

    @property
    def name(self) -> str:
        """Name in messages."""
        return parse_spec(self.spec)[0]

    def open(self, streaming: bool):
        """Open the dataset.

        Raises:
            ValueError: if the data, split or column does not exist, or contains no text; the message lists the
                alternatives.
        """
        require("datasets", "Training data")
        place = parse_spec(self.spec)[1]
        try:
            dataset = open_split(place, self.split, streaming=streaming, preferred=("train",))
            self._check(dataset)
        except ValueError as error:
            raise ValueError(f"Training data {place!r}: {error}") from error
        return dataset

    def _check(self, dataset) -> None:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("it contains no documents.")
        if self.column not in first:
            raise ValueError(f"it has no column {self.column!r}, only {', '.join(map(repr, first))}. Set text_column.")
        check_text(first[self.column], self.column, "the first document")

    def most_tokens(self) -> int | None:
        """Upper bound on the number of tokens in local, uncompressed files: one per byte. None if not known."""
        files = data_files(parse_spec(self.spec)[1])
        if not files or any(not file.endswith((".jsonl", ".json", ".csv", ".txt")) for file in files):
            return None
        return sum(os.path.getsize(file) for file in files)


def check_text(text, column: str, which: str) -> None:
    """Raises ValueError unless `text` is a string."""
    if not isinstance(text, str):
        raise ValueError(f"{which} holds {type(text).__name__} instead of text in the column {column!r}.")


def token_ids(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
    """Tokenize documents to int32 ids, each followed by the end-of-text token; an empty document has no ids."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    end = tokenizer.eos_token_id
    return [np.asarray([*ids, end] if ids else [], dtype=np.int32) for ids in encoded]


@dataclass
class _Batch:
    """Documents that are being tokenized.

    Attributes:
        before (`dict`): position of the source before these documents.
        tokens (`Future`): their token ids.
    """

    before: dict
    tokens: Future

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and a bool array that marks the first token of each document."""
        documents = self.tokens.result()
        starts = np.zeros(sum(map(len, documents)), dtype=bool)
        position = 0
        for document in documents:
            if len(document):
                starts[position] = True
            position += len(document)
        return (np.concatenate(documents) if documents else np.zeros(0, np.int32)), starts


class TokenStream:
    """The concatenated tokens of all documents of a streaming dataset, for one or more passes.

    Several files are read in turn, one batch at a time, and each pass has another order of files. Threads tokenize
    documents in advance (fast tokenizers release the GIL); their number does not change the stream.

    Args:
        source ([`TextSource`]): source of the documents.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with an end-of-text token.
        seed (`int`): seed of the order of files.
        workers (`int`): number of threads.
        passes (`int`): maximum number of passes over the documents.
    """

    def __init__(self, source: TextSource, tokenizer, *, seed: int = 0, workers: int = 1, passes: int = 1):
        self.source = source
        self._dataset = source.open(streaming=True)
        self._tokenizer = tokenizer
        self._seed, self._workers, self._passes = seed, workers, passes
        self._pool: ThreadPoolExecutor | None = None
        self._begin({"place": {"pass": 0, "next": 0, "turn": 0, "open": []}, "used": 0})

    def state(self) -> dict:
        """The position of the next token, as plain JSON values."""
        return {"place": self._place, "used": self._used}

    def load_state(self, state: dict) -> None:
        """Resume from a position returned by [`state`]."""
        self._begin(state)

    def _begin(self, state: dict) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tokenize")
        self._place, self._used = state["place"], 0
        self._tokens, self._starts = np.zeros(0, np.int32), np.zeros(0, bool)
        self._ahead: deque[_Batch] = deque()
        self._batches = self._read(copy.deepcopy(self._place))
        self.take(state["used"])  # tokens of the current batch before the position

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the next `count` tokens (int32; fewer at the end of the last pass) and a mask of document starts."""
        tokens, starts = [self._tokens[:0]], [self._starts[:0]]
        while count and (self._used < len(self._tokens) or self._next_batch()):
            piece = slice(self._used, self._used + count)
            tokens.append(self._tokens[piece])
            starts.append(self._starts[piece])
            self._used += len(tokens[-1])
            count -= len(tokens[-1])
        return np.concatenate(tokens), np.concatenate(starts)

    def exhausted_error(self) -> ValueError:
        """The error for a stream that ends before the token budget is used up."""
        times = "1 pass" if self._passes == 1 else f"{self._passes} passes"
        return ValueError(
            f"The training data {self.source.spec!r} ended after {times}, before the token budget was used up. Lower "
            "train_tokens, raise num_train_epochs (maximum number of passes), or add data."
        )

    def _next_batch(self) -> bool:
        # Twice the number of workers, so that none of them is idle while results are collected.
        for batch in itertools.islice(self._batches, 2 * self._workers - len(self._ahead)):
            self._ahead.append(batch)
        if not self._ahead:
            return False
        head = self._ahead.popleft()
        self._place, self._used = head.before, 0
        self._tokens, self._starts = head.result()
        return True

    def _read(self, place: dict) -> Iterator[_Batch]:
        """Batches of documents from `place` on: the pass, the next file, the open files, and the next one to read."""
        shards = self._dataset.num_shards
        readers = [self._open(place["pass"], at["shard"], at["documents"]) for at in place["open"]]
        while place["pass"] < self._passes:
            while len(readers) < _OPEN and place["next"] < shards:
                place["open"].append({"shard": place["next"], "documents": None})
                readers.append(self._open(place["pass"], place["next"], None))
                place["next"] += 1
            if not readers:
                place |= {"pass": place["pass"] + 1, "next": 0, "turn": 0}
                continue
            turn = place["turn"] % len(readers)
            before = copy.deepcopy(place)
            shard, rows = readers[turn]
            texts = []
            for row in itertools.islice(rows, _BATCH):
                text = row.get(self.source.column)
                check_text(text, self.source.column, f"a document of {self.source.spec!r}")
                texts.append(text)
            if not texts:
                del readers[turn], place["open"][turn]
                continue
            place["open"][turn]["documents"] = shard.state_dict()
            place["turn"] = turn + 1
            yield _Batch(before, self._pool.submit(token_ids, texts, self._tokenizer))

    def _open(self, number: int, place: int, documents: dict | None):
        """Open a file; returns its dataset and an iterator over the remaining rows."""
        shards = self._dataset.num_shards
        order = np.random.default_rng((self._seed, number)).permutation(shards)
        # A new object, since iteration must start at the first row.
        shard = self._dataset.shard(num_shards=shards, index=int(order[place]))
        if documents is not None:
            shard.load_state_dict(documents)
        return shard, iter(shard)
