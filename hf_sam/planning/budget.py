"""Convert token budgets and global batch sizes to optimizer steps and gradient accumulation."""

import math
import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_tokens(text: str | int | float) -> int:
    """Parse a token budget such as `50B`, `10M`, `3e9` or `2_000_000`.

    Raises:
        ValueError: if it is not a positive whole number.
    """
    match = re.fullmatch(r"([\d_]*\.?\d+(?:e[+-]?\d+)?)\s*([kmbt]?)", str(text).strip().lower())
    tokens = float(match[1].replace("_", "")) * _UNITS[match[2]] if match else math.nan
    # With a tolerance for decimal fractions such as 0.1.
    if not (math.isfinite(tokens) and tokens >= 1 and abs(tokens - round(tokens)) < 1e-6):
        raise ValueError(f"train_tokens={text!r} is not a number of tokens: write 50B, 10M, 500k or 2000000.")
    return round(tokens)


def steps_for(tokens: int, sequences: int, length: int) -> int:
    """Optimizer steps for a token budget, rounded up.

    Args:
        tokens (`int`): the budget.
        sequences (`int`): sequences per optimizer step, over all devices.
        length (`int`): tokens per sequence.

    Raises:
        ValueError: if the budget is smaller than one step.
    """
    if tokens < sequences * length:
        raise ValueError(
            f"train_tokens={tokens:,} is less than the {sequences * length:,} tokens of one optimizer step "
            f"({sequences} sequences of {length}). Raise the budget, or lower global_batch_size."
        )
    return math.ceil(tokens / (sequences * length))


def accumulation_for(sequences: int, per_device: int, devices: int) -> int:
    """Gradient accumulation steps for a global batch size.

    Args:
        sequences (`int`): sequences per optimizer step, over all devices.
        per_device (`int`): sequences per micro-batch on one device.
        devices (`int`): number of processes.

    Raises:
        ValueError: if the global batch size is not a multiple of `per_device * devices`.
    """
    accumulation, rest = divmod(sequences, per_device * devices)
    if rest or not accumulation:
        raise ValueError(
            f"global_batch_size={sequences} is not a multiple of per_device_train_batch_size={per_device} on {devices} "
            f"device{'s' if devices > 1 else ''}. Lower per_device_train_batch_size (gradient accumulation makes up "
            "for it, with SAM and without), or change the number of devices."
        )
    return accumulation
