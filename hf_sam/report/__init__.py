"""Reports: Markdown, and one HTML file with its pictures inside. Renders results, measures nothing.

- [`write_report`]: about one evaluation
- [`write_comparison`]: about several
"""

from .comparison import write_comparison
from .pages import write_report

__all__ = ["write_comparison", "write_report"]
