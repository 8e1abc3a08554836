"""Packed rows out of a stream, shuffled in blocks, whose place can be taken up again to the row.

Only where a block begins is remembered, not what is in it: a resumed run reads that block again and passes over the
rows that were trained on. So the state is some numbers, and what was read ahead does not matter.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch.utils.data import IterableDataset

from .documents import TokenStream
from .packing import Mixture, make_row


class PackedStream(IterableDataset):
    """Rows of several streams of documents, in blocks that are shuffled; the next block is read in the background.

    Args:
        streams (`Sequence[TokenStream]`): the sources.
        mixture ([`Mixture`]): their shares, and the size of blocks.
        length (`int`): tokens of a row.
        rows (`int`): row at which the stream ends, counted from the beginning of the data.
        padding (`int`): see [`make_row`](~hf_sam.pretraining.packing.make_row), like `document_mask`.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        mixture: Mixture,
        *,
        length: int,
        rows: int,
        padding: int = 0,
        document_mask: bool = False,
    ):
        super().__init__()
        self._streams, self._mixture, self.length, self.rows = streams, mixture, length, rows
        self._padding, self._document_mask = padding, document_mask
        self._skip = 0
        self._begin({"row": 0, "block": 0, "sources": [stream.state() for stream in streams]})

    def _begin(self, state: dict) -> None:
        # Where blocks begin, the oldest first.
        self._states = [state]
        self._next = state

    def state(self, rows: int) -> dict:
        """What `load_state` needs to go on behind the first `rows` rows; plain numbers, for JSON."""
        while len(self._states) > 1 and self._states[1]["row"] <= rows:
            self._states.pop(0)
        return {**self._states[0], "skip": rows - self._states[0]["row"]}

    def load_state(self, state: dict) -> None:
        """Go on where a state was taken."""
        for stream, place in zip(self._streams, state["sources"], strict=True):
            stream.load_state(place)
        self._begin({key: state[key] for key in ("row", "block", "sources")})
        self._skip = state["skip"]

    def __iter__(self) -> Iterator[dict]:
        with ThreadPoolExecutor(1, thread_name_prefix="pack") as background:
            ahead = background.submit(self._read)
            while (found := ahead.result()) is not None:
                first, block = found
                ahead = background.submit(self._read)
                skip, self._skip = self._skip, 0
                for tokens, starts in block[skip : self.rows - first]:
                    yield make_row(tokens, starts, self.length, self._padding, self._document_mask)

    def _read(self) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]] | None:
        """Number of the first row of the next block, and its rows; None at the end.

        Blocks do not depend on where the run ends; only at the end of the data there may be a shorter one.
        """
        state = self._next
        if state["row"] >= self.rows:
            return None
        block, short = [], None
        for stream, count in zip(self._streams, self._mixture.counts, strict=True):
            rows = [stream.take(self.length) for _ in range(count)]
            block += [row if len(row[0]) == self.length else None for row in rows]
            if block[-1] is None:
                short = short or stream
        if len(self._streams) == 1:
            block = [row for row in block if row is not None]
        ordered = [block[place] for place in self._mixture.order(state["block"], len(block))]
        # Of a mixture, rows that are there but out of their turn would change the shares.
        whole = next((place for place, row in enumerate(ordered) if row is None), len(ordered))
        if short is not None and state["row"] + whole < self.rows:
            raise short.ended()
        self._next = {
            "row": state["row"] + len(ordered),
            "block": state["block"] + 1,
            "sources": [stream.state() for stream in self._streams],
        }
        self._states.append(self._next)
        return state["row"], ordered
