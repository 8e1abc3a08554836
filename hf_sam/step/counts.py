"""Counts that may be given as fractions, as in `save_steps` and `warmup_steps` of `Trainer`."""

import math


def resolve_count(value: float, total: int) -> int:
    """Return `value` if it is a count (1 or larger), else the fraction `value` of `total`, rounded up."""
    return int(value) if value >= 1 else math.ceil(total * value)


def check_count(name: str, value: float | None, zero_allowed: bool) -> None:
    """Raises ValueError unless `value` is a count, a fraction below 1, or None."""
    if value is None:
        return
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name}={value} must be a positive count, or a fraction below 1.")
    if value > 1 and value != int(value):
        raise ValueError(f"{name}={value} must be a whole number if larger than 1.")


def ascent_count(wanted: float | None, micro_batches: int) -> int:
    """Number of the step's `micro_batches` in the ascent pass, from a `wanted` count or fraction; at least 1."""
    if wanted is None:
        return micro_batches
    return min(micro_batches, max(1, resolve_count(wanted, micro_batches)))
