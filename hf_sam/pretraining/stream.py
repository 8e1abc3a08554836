"""Packed rows from streams, shuffled in blocks, which can be resumed at the exact row.

The state contains only the position at which a block begins. A resumed run reads this block again and skips the rows
that have been trained on. So the state is small, and independent of what was read in advance.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch.utils.data import IterableDataset

from .documents import TokenStream
from .packing import Mixture, make_row


class PackedStream(IterableDataset):
    """Packed rows of several token streams, shuffled in blocks. The next block is read in the background.

    Args:
        streams (`Sequence[TokenStream]`): the sources.
        mixture ([`Mixture`]): the mixture of the sources, and the size of blocks.
        length (`int`): tokens per row.
        rows (`int`): end of the stream, in rows from the beginning of the data.
        padding, document_mask, mask_repetitive: see [`make_row`](~hf_sam.pretraining.packing.make_row).
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
        mask_repetitive: bool = False,
    ):
        super().__init__()
        self._streams, self._mixture, self.length, self.rows = streams, mixture, length, rows
        self._padding, self._masks = padding, (document_mask, mask_repetitive)
        self._skip = 0
        self._begin({"row": 0, "block": 0, "sources": [stream.state() for stream in streams]})

    def _begin(self, state: dict) -> None:
        # Positions at the beginning of blocks, the oldest first.
        self._states = [state]
        self._next = state

    def state(self, rows: int) -> dict:
        """The position after the first `rows` rows, as plain JSON values, for [`load_state`]."""
        while len(self._states) > 1 and self._states[1]["row"] <= rows:
            self._states.pop(0)
        return {**self._states[0], "skip": rows - self._states[0]["row"]}

    def load_state(self, state: dict) -> None:
        """Resume from a position returned by [`state`]."""
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
                    yield make_row(tokens, starts, self.length, self._padding, *self._masks)

    def _read(self) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]] | None:
        """Read the next block; returns the number of its first row and its rows, or None at the end.

        Blocks do not depend on the length of the run. Only the last block of the data may be shorter.
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
        # Stop at the first missing row, since later rows of other sources would change the mixture.
        whole = next((place for place, row in enumerate(ordered) if row is None), len(ordered))
        if short is not None and state["row"] + whole < self.rows:
            raise short.exhausted_error()
        self._next = {
            "row": state["row"] + len(ordered),
            "block": state["block"] + 1,
            "sources": [stream.state() for stream in self._streams],
        }
        self._states.append(self._next)
        return state["row"], ordered
