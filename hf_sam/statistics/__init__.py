"""Statistics of measured losses: intervals over documents and seeds, forgetting, learning against forgetting."""

from .curves import forgetting_at, pareto_frontier, shared_range
from .estimate import Estimate
from .inflection import InflectionPoint, inflection_point
from .losses import HeldOutLoss, forgetting, mean_forgetting
from .reduction import Reduction, ReductionCurve, TunedRun, damage_reduction, forgetting_reduction
from .scores import ScoreDifference, ScoredRun, score_difference

__all__ = [
    "Estimate",
    "HeldOutLoss",
    "InflectionPoint",
    "Reduction",
    "ReductionCurve",
    "ScoreDifference",
    "ScoredRun",
    "TunedRun",
    "damage_reduction",
    "forgetting",
    "forgetting_at",
    "forgetting_reduction",
    "inflection_point",
    "mean_forgetting",
    "pareto_frontier",
    "score_difference",
    "shared_range",
]
