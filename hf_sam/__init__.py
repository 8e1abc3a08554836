"""hf-sam: sharpness-aware training for the Hugging Face stack.

`SAMTrainer` is `transformers.Trainer` with a two-pass step, `SAMMixin` gives that step to any other trainer, and
`SAMArguments` gives its flags to any other config.
"""

from importlib.metadata import version

from .arguments import SAMArguments, SAMTrainingArguments
from .trainer import SAMMixin, SAMTrainer

__all__ = ["SAMArguments", "SAMMixin", "SAMTrainer", "SAMTrainingArguments", "__version__"]

__version__ = version("hf-sam")
