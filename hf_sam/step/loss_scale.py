"""Find the fp16 loss scale in use. A training loop may use its own `GradScaler`, so its calls are recorded."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def record_scalers() -> Iterator[list[torch.amp.GradScaler]]:
    """Inside the context, each scaler that scales a loss is appended to the yielded list."""
    used: list[torch.amp.GradScaler] = []
    scale = torch.amp.GradScaler.scale

    def recording_scale(self, outputs):
        if self.is_enabled() and not any(scaler is self for scaler in used):
            used.append(self)
        return scale(self, outputs)

    torch.amp.GradScaler.scale = recording_scale
    try:
        yield used
    finally:
        torch.amp.GradScaler.scale = scale
