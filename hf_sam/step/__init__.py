"""The SAM step: two forward-backward passes per optimizer step, for any training loop."""

from .sam_step import SAMStep

__all__ = ["SAMStep"]
