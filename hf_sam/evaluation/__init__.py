"""`hf-sam evaluate` from beginning to end.

- [`EvaluationArguments`]: what to measure
- [`evaluate`]: measures part by part, resumes an interrupted evaluation, and returns the record
- [`Results`]: reads a record
"""

from .results import Results
from .run import evaluate
from .settings import EvaluationArguments

__all__ = ["EvaluationArguments", "Results", "evaluate"]
