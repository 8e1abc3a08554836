"""Gradients of the held-out loss that leave the `.grad` of the model unchanged."""

import contextlib
from collections.abc import Iterator

import torch

from ..runtime.distributed import all_reduce_sum
from .batches import shared_batches
from .loss import count_tokens, summed_loss


def loss_gradient(
    model: torch.nn.Module, params: dict[str, torch.nn.Parameter], data, batch_size: int
) -> dict[str, torch.Tensor]:
    """Gradient of the loss per token over all data and processes; `.grad` of the model does not change."""
    tokens = count_tokens(data, batch_size)
    with only_trainable(model, params):
        for batch, counts in shared_batches(data, batch_size, "gradient"):
            if counts:
                (summed_loss(model, batch) / tokens).backward()
        # Moved out of the parameters one by one, so that there is never a second copy.
        gradient = {}
        for name, param in params.items():
            value, param.grad = param.grad, None
            gradient[name] = all_reduce_sum(torch.zeros_like(param) if value is None else value)
    return gradient


@contextlib.contextmanager
def only_trainable(model: torch.nn.Module, params: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Context manager: exactly `params` require gradients, and have none; restored at the end.

    Raises:
        ValueError: if an optimizer steps in the backward pass, which would change the weights.
    """
    chosen = set(params.values())
    before = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    if any(getattr(param, "_post_accumulate_grad_hooks", None) for param in chosen):
        raise ValueError(
            "An optimizer steps in the backward pass of this model, which a measurement would set off. Measure a model "
            "without it, e.g. one that is loaded anew."
        )
    try:
        for param, _, _ in before:
            param.requires_grad_(param in chosen)
            param.grad = None
        yield
    finally:
        for param, flag, grad in before:
            param.requires_grad_(flag)
            param.grad = grad


def check_precise(params: dict[str, torch.nn.Parameter], what: str) -> None:
    """Raises ValueError for weights in 16 bits, whose rounding would be measured instead."""
    coarse = [name for name, param in params.items() if torch.finfo(param.dtype).bits < 32]
    if coarse:
        raise ValueError(
            f"{what} needs fp32 weights, but {coarse[0]!r} is in {params[coarse[0]].dtype}. Load the model with "
            "dtype=torch.float32."
        )
