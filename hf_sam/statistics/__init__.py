"""Statistics of measured losses: intervals, forgetting, and learning against forgetting. Needs NumPy only."""

from .estimate import Estimate
from .frontier import (
    InflectionPoint,
    Reduction,
    TunedRun,
    forgetting_at,
    forgetting_reduction,
    inflection_point,
    pareto_frontier,
    shared_range,
)
from .losses import HeldOutLoss, forgetting

__all__ = [
    "Estimate",
    "HeldOutLoss",
    "InflectionPoint",
    "Reduction",
    "TunedRun",
    "forgetting",
    "forgetting_at",
    "forgetting_reduction",
    "inflection_point",
    "pareto_frontier",
    "shared_range",
]
