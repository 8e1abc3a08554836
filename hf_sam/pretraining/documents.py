"""Text as a stream of tokens whose position can be saved and taken up again, to the token."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..named_data import data_files, named, open_split

# Documents that a worker tokenizes at once.
_BATCH = 128


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        spec (`str`): `[NAME=]PLACE`, see [`~hf_sam.named_data.open_split`].
        column (`str`): column of text.
        split (`str` or `None`): the split; train, or the first that there is, when omitted.
    """

    spec: str
    column: str = "text"
    split: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return named(self.spec)[0]

    def open(self, streaming: bool):
        """The dataset of documents.

        Raises:
            ValueError: if there is no such data, split or column, or no text in it; the message names what there is.
        """
        place = named(self.spec)[1]
        try:
            dataset = open_split(place, self.split, streaming=streaming, preferred=("train",))
            self._check(dataset)
        except ValueError as error:
            raise ValueError(f"Training data {place!r}: {error}") from error
        return dataset

    def _check(self, dataset) -> None:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("there are no documents in it.")
        if self.column not in first:
            raise ValueError(f"it has no column {self.column!r}, but {', '.join(map(repr, first))}.")
        check_text(first[self.column], self.column, "the first document")

    def most_tokens(self) -> int | None:
        """A bound on the tokens of local, uncompressed files: each takes at least one byte. None if not known."""
        files = data_files(named(self.spec)[1])
        if not files or any(not file.endswith((".jsonl", ".json", ".csv", ".txt")) for file in files):
            return None
        return sum(os.path.getsize(file) for file in files)


def check_text(text, column: str, which: str) -> None:
    """Raises ValueError unless `text` is text."""
    if not isinstance(text, str):
        raise ValueError(f"{which} holds {type(text).__name__} instead of text in the column {column!r}.")


def token_ids(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
    """Each document as int32 tokens with the end-of-text token behind; an empty one as no tokens."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    end = tokenizer.eos_token_id
    return [np.asarray([*ids, end] if ids else [], dtype=np.int32) for ids in encoded]


@dataclass
class _Batch:
    """Some documents on their way: where the source stood before them, and their tokens when they are ready."""

    before: dict
    tokens: Future

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them begin a document."""
        documents = self.tokens.result()
        starts = np.zeros(sum(map(len, documents)), dtype=bool)
        position = 0
        for document in documents:
            if len(document):
                starts[position] = True
            position += len(document)
        return (np.concatenate(documents) if documents else np.zeros(0, np.int32)), starts


class TokenStream:
    """The documents of a streaming dataset, tokenized, one behind the other, pass after pass.

    Documents are tokenized ahead by `workers` threads (fast tokenizers do not hold Python's lock); how many does not
    change the stream. The files of the dataset are visited in another order in every pass.

    Args:
        source ([`Source`]): where the documents come from.
        tokenizer (`PreTrainedTokenizerBase`): with an end-of-text token.
        seed (`int`): of the order of files.
        workers (`int`): threads.
        passes (`int`): how often the documents may be gone through.
    """

    def __init__(self, source: Source, tokenizer, *, seed: int = 0, workers: int = 1, passes: int = 1):
        self.source = source
        self._dataset = source.open(streaming=True)
        self._tokenizer = tokenizer
        self._seed, self._workers, self._passes = seed, workers, passes
        self._begin({"pass": 0, "shard": 0, "documents": None, "used": 0})

    def state(self) -> dict:
        """Where the next token comes from: plain numbers, for JSON."""
        return {**self._before, "used": self._used}

    def load_state(self, state: dict) -> None:
        """Go on where [`state`] was taken."""
        self._begin(state)

    def _begin(self, state: dict) -> None:
        self._before = {key: state[key] for key in ("pass", "shard", "documents")}
        self._used = 0
        self._tokens, self._starts = np.zeros(0, np.int32), np.zeros(0, bool)
        self._ahead: deque[_Batch] = deque()
        self._batches = self._read(**self._before)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tokenize")
        skip = state["used"]
        while skip:  # of the batch that the position lies in
            _, taken = self.take(skip)
            skip -= len(taken)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` tokens (int32), and which of them begin a document.

        Raises:
            ValueError: when all passes are through.
        """
        tokens, starts = [], []
        while count:
            if self._used == len(self._tokens):
                self._next_batch()
            piece = slice(self._used, self._used + count)
            tokens.append(self._tokens[piece])
            starts.append(self._starts[piece])
            self._used += len(tokens[-1])
            count -= len(tokens[-1])
        if not tokens:
            return self._tokens[:0], self._starts[:0]
        return np.concatenate(tokens), np.concatenate(starts)

    def _next_batch(self) -> None:
        # Twice as many as there are workers: none of them waits while results are fetched.
        for batch in itertools.islice(self._batches, 2 * self._workers - len(self._ahead)):
            self._ahead.append(batch)
        if not self._ahead:
            self._pool.shutdown()
            raise ValueError(
                f"The training data {self.source.spec!r} ended after {self._passes} "
                f"pass{'es' if self._passes > 1 else ''}, before the token budget was used up. Lower train_tokens, "
                "raise num_train_epochs (passes over the data), or give more data."
            )
        head = self._ahead.popleft()
        self._before, self._used = head.before, 0
        self._tokens, self._starts = head.result()

    def _read(self, **position) -> Iterator[_Batch]:
        first_pass, first_shard, documents = position["pass"], position["shard"], position["documents"]
        shards = self._dataset.num_shards
        for number in range(first_pass, self._passes):
            order = np.random.default_rng((self._seed, number)).permutation(shards)
            for place in range(first_shard if number == first_pass else 0, shards):
                # A new object each time, which begins at the beginning.
                shard = self._dataset.shard(num_shards=shards, index=int(order[place]))
                if documents is not None:
                    shard.load_state_dict(documents)
                yield from self._batches_of(shard, {"pass": number, "shard": place, "documents": documents})
                documents = None

    def _batches_of(self, shard, before: dict) -> Iterator[_Batch]:
        rows = iter(shard)
        while True:
            texts = []
            for row in itertools.islice(rows, _BATCH):
                text = row.get(self.source.column)
                check_text(text, self.source.column, f"a document of {self.source.spec!r}")
                texts.append(text)
            if not texts:
                return
            yield _Batch(before, self._pool.submit(token_ids, texts, self._tokenizer))
            # Before it is read from, a dataset does not know the state that was loaded.
            before = {**before, "documents": shard.state_dict()}
