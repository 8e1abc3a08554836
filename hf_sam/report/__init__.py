"""Evaluations from beginning to end: `hf-sam evaluate` and `hf-sam report`.

- [`EvaluationArguments`]: what to measure
- [`evaluate`]: measures it part by part, goes on where it was interrupted, and returns the record
- [`Results`]: reads a record
- [`write_report`]: Markdown and one HTML file about one evaluation
- [`write_comparison`]: the same about several
"""

from .comparison import write_comparison
from .pages import write_report
from .results import Results
from .run import evaluate
from .settings import EvaluationArguments

__all__ = ["EvaluationArguments", "Results", "evaluate", "write_comparison", "write_report"]
