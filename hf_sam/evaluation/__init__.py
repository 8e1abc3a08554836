"""`hf-sam evaluate` from beginning to end.

- [`EvaluationArguments`]: what to measure
- [`evaluate`]: measures it part by part, goes on where it was interrupted, and returns the record
- [`Results`]: reads a record
"""

from .results import Results
from .run import evaluate
from .settings import EvaluationArguments

__all__ = ["EvaluationArguments", "Results", "evaluate"]
