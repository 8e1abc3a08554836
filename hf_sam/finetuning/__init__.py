"""Supervised fine-tuning over a sweep of learning rates, on the datasets of the papers or your own.

- [`SFTDataArguments`], [`SweepArguments`]: the settings
- [`run_sweep`]: one run for each learning rate, resumed where it was interrupted
- [`plan_sweep`]: tokens, steps, memory and time of a run, computed without running it
- [`load_examples`]: a dataset as prompts with completions, conversations or text
"""

from .data import load_examples
from .plan import plan_sweep
from .settings import SFTDataArguments, SweepArguments
from .sweep import run_sweep

__all__ = ["SFTDataArguments", "SweepArguments", "load_examples", "plan_sweep", "run_sweep"]
