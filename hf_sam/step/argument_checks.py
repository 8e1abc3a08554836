"""Type checks of the arguments of [`SAMStep`]."""

from typing import Any

import torch
from accelerate import Accelerator


def check_types(accelerator, model, optimizer) -> None:
    """Raises TypeError if an argument has the wrong type, e.g. because the arguments are in the wrong order."""
    for name, value, kind in (("accelerator", accelerator, Accelerator), ("model", model, torch.nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(
                f"SAMStep(accelerator, model, rho): {name} must be a {kind.__name__}, but got {describe(value)}."
            )
    optimizers = [optimizer] if optimizer is None or not isinstance(optimizer, list | tuple) else optimizer
    for value in optimizers:
        if value is not None and not hasattr(value, "param_groups"):
            raise TypeError(f"SAMStep: optimizer must be an optimizer or a list of them, but got {describe(value)}.")


def describe(value: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


def check_one_pass(variant, loss_rise: float, ascent_micro_batches: float | None, ascent_sync: str) -> None:
    """Raises ValueError if a variant without an ascent pass gets a setting of that pass."""
    given = {"loss_rise": loss_rise, "ascent_micro_batches": ascent_micro_batches, "ascent_sync": ascent_sync}
    unused = [name for name, value in given.items() if value not in (None, 0, "global")]
    if variant.passes == 1 and unused:
        raise ValueError(
            f"{unused[0]}={given[unused[0]]!r} has no meaning with the variant {variant.name!r}, which has no ascent "
            "pass. Remove it, or choose another variant."
        )
