"""The loss scale of fp16 training, seen where it is applied: loops may have a `GradScaler` of their own."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def scalers_used() -> Iterator[list[torch.amp.GradScaler]]:
    """Inside, the yielded list takes in each scaler that scales a loss."""
    used: list[torch.amp.GradScaler] = []
    scale = torch.amp.GradScaler.scale

    def observed(self, outputs):
        if self.is_enabled() and not any(scaler is self for scaler in used):
            used.append(self)
        return scale(self, outputs)

    torch.amp.GradScaler.scale = observed
    try:
        yield used
    finally:
        torch.amp.GradScaler.scale = scale
