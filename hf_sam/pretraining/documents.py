"""Text as a stream of tokens whose position can be saved and taken up again, to the token."""

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

# Documents that a worker tokenizes at once, and files that are read at once.
_BATCH = 64
_OPEN = 8


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        spec (`str`): `[NAME=]PLACE`, see [`~hf_sam.runtime.dataset_specs.open_split`].
        column (`str`): column of text.
        split (`str` or `None`): the split; train, or the first that there is, when omitted.
    """

    spec: str
    column: str = "text"
    split: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return parse_spec(self.spec)[0]

    def open(self, streaming: bool):
        """The dataset of documents.

        Raises:
            ValueError: if there is no such data, split or column, or no text in it; the message names what there is.
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
            raise ValueError("there are no documents in it.")
        if self.column not in first:
            raise ValueError(f"it has no column {self.column!r}, but {', '.join(map(repr, first))}.")
        check_text(first[self.column], self.column, "the first document")

    def most_tokens(self) -> int | None:
        """A bound on the tokens of local, uncompressed files: each takes at least one byte. None if not known."""
        files = data_files(parse_spec(self.spec)[1])
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

    Several files are read at once, a batch of each in turn, in another order in every pass. Documents are tokenized
    ahead by `workers` threads (fast tokenizers do not hold Python's lock); how many does not change the stream.

    Args:
        source ([`TextSource`]): where the documents come from.
        tokenizer (`PreTrainedTokenizerBase`): with an end-of-text token.
        seed (`int`): of the order of files.
        workers (`int`): threads.
        passes (`int`): how often the documents may be gone through.
    """

    def __init__(self, source: TextSource, tokenizer, *, seed: int = 0, workers: int = 1, passes: int = 1):
        self.source = source
        self._dataset = source.open(streaming=True)
        self._tokenizer = tokenizer
        self._seed, self._workers, self._passes = seed, workers, passes
        self._pool: ThreadPoolExecutor | None = None
        self._begin({"place": {"pass": 0, "next": 0, "turn": 0, "open": []}, "used": 0})

    def state(self) -> dict:
        """Where the next token comes from: plain numbers, for JSON."""
        return {"place": self._place, "used": self._used}

    def load_state(self, state: dict) -> None:
        """Go on where [`state`] was taken."""
        self._begin(state)

    def _begin(self, state: dict) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tokenize")
        self._place, self._used = state["place"], 0
        self._tokens, self._starts = np.zeros(0, np.int32), np.zeros(0, bool)
        self._ahead: deque[_Batch] = deque()
        self._batches = self._read(copy.deepcopy(self._place))
        self.take(state["used"])  # of the batch that the position lies in

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` tokens (int32), and which of them begin a document; fewer at the end of the last pass."""
        tokens, starts = [self._tokens[:0]], [self._starts[:0]]
        while count and (self._used < len(self._tokens) or self._next_batch()):
            piece = slice(self._used, self._used + count)
            tokens.append(self._tokens[piece])
            starts.append(self._starts[piece])
            self._used += len(tokens[-1])
            count -= len(tokens[-1])
        return np.concatenate(tokens), np.concatenate(starts)

    def ended(self) -> ValueError:
        """What to tell when there are no more tokens, and there should be."""
        times = "1 pass" if self._passes == 1 else f"{self._passes} passes"
        return ValueError(
            f"The training data {self.source.spec!r} ended after {times}, before the token budget was used up. Lower "
            "train_tokens, raise num_train_epochs (passes over the data), or give more data."
        )

    def _next_batch(self) -> bool:
        # Twice as many as there are workers: none of them waits while results are fetched.
        for batch in itertools.islice(self._batches, 2 * self._workers - len(self._ahead)):
            self._ahead.append(batch)
        if not self._ahead:
            return False
        head = self._ahead.popleft()
        self._place, self._used = head.before, 0
        self._tokens, self._starts = head.result()
        return True

    def _read(self, place: dict) -> Iterator[_Batch]:
        """Batches of documents from a place on, which is a pass, the files that are open, and whose turn it is."""
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
        """A file, and an iterator over the rest of its rows."""
        shards = self._dataset.num_shards
        order = np.random.default_rng((self._seed, number)).permutation(shards)
        # A new object each time, which begins at the beginning.
        shard = self._dataset.shard(num_shards=shards, index=int(order[place]))
        if documents is not None:
            shard.load_state_dict(documents)
        return shard, iter(shard)
