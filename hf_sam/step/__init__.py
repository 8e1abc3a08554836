"""The two passes of a SAM step, and nothing else."""

from .sam_step import SAMStep

__all__ = ["SAMStep"]
