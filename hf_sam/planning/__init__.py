"""Plan a training run without running it: token budgets, memory per device, time."""

from .budget import accumulation_for, parse_tokens, steps_for
from .plan import Plan, measure_model

__all__ = ["Plan", "accumulation_for", "measure_model", "parse_tokens", "steps_for"]
