"""Checks that the arguments of [`SAMStep`] are of the right kind, and in the right order."""

from typing import Any

import torch
from accelerate import Accelerator


def check_kinds(accelerator, model, optimizer) -> None:
    """Raises TypeError for arguments in another order than they are expected in."""
    for name, value, kind in (("accelerator", accelerator, Accelerator), ("model", model, torch.nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(
                f"SAMStep(accelerator, model, rho): {name} must be a {kind.__name__}, but got {described(value)}."
            )
    optimizers = [optimizer] if optimizer is None or not isinstance(optimizer, list | tuple) else optimizer
    for value in optimizers:
        if value is not None and not hasattr(value, "param_groups"):
            raise TypeError(f"SAMStep: optimizer must be an optimizer or a list of them, but got {described(value)}.")


def described(value: Any) -> str:
    """A value as an error message names it."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
