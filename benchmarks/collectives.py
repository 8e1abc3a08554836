"""Counts the collectives of torch.distributed, those of DDP, FSDP2 and DeepSpeed included."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Scalars that ranks agree on, e.g. norms, are messages of at most this many bytes.
SMALL = 64


class CollectiveCounter(TorchDispatchMode):
    """Records the collectives that start inside of the context.

    Attributes:
        messages (`list[tuple[str, int]]`): name and bytes of each collective; the bytes are those of all its arguments,
            of an all-gather input and output.
    """

    def __init__(self):
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2].strip("_")
            if size := _bytes(args):
                self.messages.append((name, size))
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        """Bytes of all messages."""
        return sum(size for _, size in self.messages)

    def large(self) -> list[tuple[str, int]]:
        """The messages with weights or gradients, in order of size."""
        return sorted(message for message in self.messages if message[1] > SMALL)

    def small(self) -> list[int]:
        """The sizes of the other messages."""
        return sorted(size for _, size in self.messages if size <= SMALL)


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
