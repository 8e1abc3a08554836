"""Counts that may be given as shares: the convention of `save_steps` and `warmup_steps`."""

import math


def resolve_count(value: float, total: int) -> int:
    """A count, or a share of `total` rounded up if below 1: the convention of `save_steps` and `warmup_steps`."""
    return int(value) if value >= 1 else math.ceil(total * value)


def check_count(name: str, value: float | None, zero_allowed: bool) -> None:
    """Raise ValueError unless `value` is a count, a share below 1, or None."""
    if value is None:
        return
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name}={value} must be a positive count, or a share of all of them below 1.")
    if value > 1 and value != int(value):
        raise ValueError(f"{name}={value} must be a whole number if larger than 1.")


def ascent_count(wanted: float | None, micro_batches: int) -> int:
    """How many of the step's `micro_batches` the ascent pass uses, of a `wanted` count or share: at least one."""
    if wanted is None:
        return micro_batches
    return min(micro_batches, max(1, resolve_count(wanted, micro_batches)))
