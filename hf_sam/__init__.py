"""hf-sam: sharpness-aware training for the Hugging Face stack.

`SAMTrainer` and `SAMSFTTrainer` are `transformers.Trainer` and `trl.SFTTrainer` with a two-pass step; `with_sam` makes
the same of any other trainer and its config, out of `SAMMixin` and `SAMArguments`; `SAMStep` is the step for a training
loop of one's own.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from . import host_messages as _host_messages  # noqa: F401  (first: its filters must be set when hosts are imported)
from .arguments import SAMArguments, SAMTrainingArguments
from .factory import with_sam
from .step import SAMStep
from .trainer import SAMMixin, SAMTrainer

if TYPE_CHECKING:
    from .sft import SAMSFTConfig as SAMSFTConfig
    from .sft import SAMSFTTrainer as SAMSFTTrainer

# Without SAMSFTTrainer and SAMSFTConfig, so that `from hf_sam import *` works without TRL.
__all__ = [
    "SAMArguments",
    "SAMMixin",
    "SAMStep",
    "SAMTrainer",
    "SAMTrainingArguments",
    "__version__",
    "with_sam",
]

__version__ = version("hf-sam")


def __getattr__(name: str):
    # TRL is an extra, and takes seconds to import.
    if name in ("SAMSFTConfig", "SAMSFTTrainer"):
        from . import sft

        return getattr(sft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
