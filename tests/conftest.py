"""Settings that every test runs under."""

import os

# Before torch is imported: more threads than cores slow the small models here down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps precision and plugins of the first accelerator in a process; tests must not share them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
