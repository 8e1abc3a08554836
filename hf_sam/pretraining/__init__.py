"""Pretraining, annealing and mid-training on text: token budgets, packing, exact resumption.

- [`PretrainingArguments`], [`ModelArguments`], [`DataArguments`]: the settings
- [`pretrain`]: run a training from its settings to the saved model
- [`plan`]: estimate the cost of a run without running it
- [`PretrainingTrainer`]: the trainer, for custom scripts
- [`PackedRows`], [`PackedStream`], [`Mixture`]: documents packed into rows, tokenized before or during training
- [`ZLoss`]: the loss of OLMo-2
"""

from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .data import TrainingData, training_data
from .documents import TextSource, TokenStream
from .loss import ZLoss
from .packing import MixedRows, Mixture, PackedRows, tokenized
from .run import plan, pretrain
from .stream import PackedStream
from .trainer import PretrainingTrainer

__all__ = [
    "DataArguments",
    "MixedRows",
    "Mixture",
    "ModelArguments",
    "PackedRows",
    "PackedStream",
    "PretrainingArguments",
    "PretrainingTrainer",
    "TextSource",
    "TokenStream",
    "TrainingData",
    "ZLoss",
    "plan",
    "pretrain",
    "tokenized",
    "training_data",
]
