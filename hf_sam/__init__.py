"""hf-sam: sharpness-aware minimization for the Hugging Face stack.

`SAMTrainer` and `SAMSFTTrainer` are `transformers.Trainer` and `trl.SFTTrainer` with two passes per optimizer step.
`with_sam` adds SAM to any other trainer or config class, with `SAMMixin` and `SAMArguments`. `SAMStep` is the step for
a custom training loop.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .runtime import host_messages as _host_messages  # noqa: F401  (sets its filters before other libraries are imported)

if TYPE_CHECKING:
    from .arguments import SAMArguments, SAMTrainingArguments
    from .factory import with_sam
    from .sft import SAMSFTConfig as SAMSFTConfig
    from .sft import SAMSFTTrainer as SAMSFTTrainer
    from .step import SAMStep
    from .trainer import SAMMixin, SAMTrainer

# SAMSFTTrainer and SAMSFTConfig are left out, so that `from hf_sam import *` works without TRL.
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

# Imported lazily: torch and transformers take seconds to import, and `hf-sam --help` does not need them.
_MODULES = {
    "SAMArguments": ".arguments",
    "SAMTrainingArguments": ".arguments",
    "with_sam": ".factory",
    "SAMSFTConfig": ".sft",
    "SAMSFTTrainer": ".sft",
    "SAMStep": ".step",
    "SAMMixin": ".trainer",
    "SAMTrainer": ".trainer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
