"""Compute a micro-batch a second time without side effects.

The descent pass must start from the same state as the ascent pass: inputs, dropout masks, module states, and the random
generators of the loop. States that a forward pass advances must advance once per step, as in plain training.
"""

from .disabled import disable_method
from .inputs import KeptInputs
from .loop_state import CapturedState, LoopState, parameters_reached
from .random_streams import RandomState
from .reach import reach, reach_class
from .snapshot import Snapshot

__all__ = [
    "CapturedState",
    "KeptInputs",
    "LoopState",
    "RandomState",
    "Snapshot",
    "disable_method",
    "parameters_reached",
    "reach",
    "reach_class",
]
