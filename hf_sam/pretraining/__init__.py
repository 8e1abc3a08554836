"""Pretraining, annealing and mid-training on text: budgets in tokens, packing, exact resumption.

- [`PretrainingArguments`], [`ModelArguments`], [`DataArguments`]: the settings
- [`pretrain`]: a run from its settings to the saved model
- [`plan`]: what it will take, told without running it
- [`PretrainingTrainer`]: the trainer, for a script of one's own
- [`PackedRows`], [`PackedStream`], [`Mixture`]: documents as rows of one length, tokenized before or while training
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
