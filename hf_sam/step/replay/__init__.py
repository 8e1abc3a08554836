"""Computing a micro-batch a second time without leaving a trace of it.

The descent pass must see what the ascent pass saw (inputs, dropout masks, states of modules, the loop's own random
generators), and whatever a forward pass advances must advance once a step, as in plain training.
"""

from .inputs import KeptInputs
from .muted import muted
from .random_streams import RandomState
from .reach import reach, reach_class
from .snapshot import Snapshot
from .world import World, WorldState, parameters_reached

__all__ = [
    "KeptInputs",
    "RandomState",
    "Snapshot",
    "World",
    "WorldState",
    "muted",
    "parameters_reached",
    "reach",
    "reach_class",
]
