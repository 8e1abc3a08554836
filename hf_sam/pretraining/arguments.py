"""Settings of pretraining, annealing and mid-training runs."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import SAMTrainingArguments
from ..planning import accumulation_for, parse_tokens, steps_for
from ..runtime.distributed import launched_world_size
from ..runtime.fingerprint import fingerprint


@dataclass(repr=False)  # the repr of TrainingArguments hides tokens
class PretrainingArguments(SAMTrainingArguments):
    """[`SAMTrainingArguments`] with budgets in tokens and sequences instead of steps and micro-batches.

    Parameters:
        train_tokens (`str`, *optional*):
            Number of tokens to train on: `50B`, `10M`. With `anneal_from`, the tokens of the annealing phase, or a
            percentage of the steps of the checkpoint: `10%`. Sets `max_steps`.
        global_batch_size (`int`, *optional*):
            Sequences per optimizer step over all devices. Sets `gradient_accumulation_steps`.
        sequence_length (`int`, *optional*, defaults to 2048):
            Tokens per row.
        document_mask (`bool`, *optional*, defaults to `False`):
            Mask attention between documents.
        z_loss (`float`, *optional*, defaults to 0):
            Weight of the z-loss; 1e-5 in OLMo-2.
        no_weight_decay (`list[str]`, *optional*):
            Regular expressions over parameter names, e.g. `embed_tokens`: parameters without weight decay. When
            omitted, biases and norms have no weight decay, as in `Trainer`.
        anneal_from (`str`, *optional*):
            A checkpoint of a run with constant learning rate. The run continues with its weights, optimizer state and
            data position, and the learning rate decays over `train_tokens`.
        ema_decay (`float`, *optional*):
            Save an exponential moving average of the weights of this run instead of the last ones; its decay per step,
            e.g. 0.998. With `anneal_from`, it begins anew. Not with DeepSpeed.
        num_train_epochs (`float`, *optional*, defaults to 1):
            With `train_tokens`, the maximum number of passes over the data.

    Raises:
        ValueError: if the token budget or the batch size is impossible.
    """

    train_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Training tokens, e.g. 50B or 10M; with anneal_from also a percentage of its steps, e.g. 10%%."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences per optimizer step over all devices; sets gradient_accumulation_steps."},
    )
    sequence_length: int = field(default=2048, metadata={"help": "Tokens per row."})
    document_mask: bool = field(default=False, metadata={"help": "Mask attention between documents."})
    z_loss: float = field(default=0.0, metadata={"help": "Weight of the z-loss, the mean square of log Z."})
    no_weight_decay: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions of parameters without weight decay. Default: biases and norms, as in Trainer."
        },
    )
    anneal_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of a run with constant learning rate to continue from with a final decay."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Save an exponential moving average of the weights, with this decay per step, e.g. 0.998."},
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the data; with train_tokens, the maximum number of passes."}
    )

    def __post_init__(self):
        for name in ("sequence_length", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or larger.")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be 2 or larger.")
        self.z_loss = float(self.z_loss)
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            raise ValueError(f"z_loss={self.z_loss} must be 0 or larger.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be between 0 and 1, e.g. 0.998.")
        if self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError("ema_decay replaces the weights at the end, and so does load_best_model_at_end. Drop one.")
        if isinstance(self.no_weight_decay, str):
            self.no_weight_decay = [self.no_weight_decay]
        # Before the checks of `TrainingArguments`, which fill in DeepSpeed's "auto" values.
        if self.global_batch_size is not None:
            devices = launched_world_size()
            self.gradient_accumulation_steps = accumulation_for(
                self.global_batch_size, self.per_device_train_batch_size, devices
            )
        if self.num_train_epochs < 1 or self.num_train_epochs != int(self.num_train_epochs):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be a whole number of passes.")
        if self.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint would replace the callback that saves the data position. Drop "
                "it."
            )
        # The rows are already in the order of training.
        self.train_sampling_strategy = "sequential"
        if self.train_tokens is not None:
            self.max_steps = self._steps()
        elif self.max_steps < 1:
            raise ValueError("Say how long to train: train_tokens, e.g. 50B, or max_steps.")
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.n_gpu} GPUs, so Trainer would use DataParallel, which is not supported. Start "
                "one process per GPU: accelerate launch SCRIPT ..."
            )

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step over all devices."""
        devices = launched_world_size()
        return self.per_device_train_batch_size * devices * self.gradient_accumulation_steps

    @property
    def first_step(self) -> int:
        """Step of the checkpoint `anneal_from`, or 0."""
        return 0 if self.anneal_from is None else checkpoint_step(self.anneal_from)

    def _steps(self) -> int:
        first = self.first_step
        share = re.fullmatch(r"([\d.]+)\s*%", str(self.train_tokens).strip())
        if share:
            if self.anneal_from is None:
                raise ValueError(
                    f"train_tokens={self.train_tokens!r} is a percentage of the steps of anneal_from. Set anneal_from, "
                    "or a number of tokens."
                )
            steps = math.ceil(first * float(share[1]) / 100)
            if steps < 1:
                raise ValueError(
                    f"train_tokens={self.train_tokens!r} of {first} steps is less than one step. Raise train_tokens."
                )
        else:
            steps = steps_for(parse_tokens(self.train_tokens), self.sequences, self.sequence_length)
        if self.anneal_from is not None:
            self.anneal_steps = steps
        return first + steps


def checkpoint_step(folder: str | Path) -> int:
    """Number of optimizer steps of a checkpoint of `Trainer`.

    Raises:
        ValueError: if the folder is not a checkpoint.
    """
    folder = Path(folder)
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} is not a checkpoint of a training run (it has no readable trainer_state.json). Set "
            "anneal_from to a folder checkpoint-N; to start from weights only, set model_name_or_path."
        ) from error
    return int(step)


def checkpoint_hash(folder: str | None) -> str | None:
    """Fingerprint of a checkpoint, from its `trainer_state.json`; None for None."""
    if folder is None:
        return None
    return fingerprint((Path(folder) / "trainer_state.json").read_bytes())


@dataclass
class ModelArguments:
    """The model to train.

    Parameters:
        model_name_or_path (`str`, *optional*): a folder or a Hub id; training starts from its weights.
        model_revision (`str`, *optional*): branch, tag or commit on the Hub.
        config_name (`str`, *optional*): a JSON file or folder with a model config; training starts from random weights.
        tokenizer_name (`str`, *optional*): a folder or a Hub id; that of the model when omitted.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    config_name: str | None = field(
        default=None, metadata={"help": "Model config (JSON file or folder); training starts from random weights."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: the model's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class DataArguments:
    """The data to train on.

    Parameters:
        datasets (`list[str]`):
            Files, glob patterns, folders, or `HUB/ID[/FOLDER][:CONFIG][@REVISION]`.
        dataset_weights (`list[float]`, *optional*):
            Fractions of the tokens from each dataset; equal when omitted.
        dataset_split (`str`, *optional*):
            Split of all datasets; `train` when omitted.
        text_column (`str`, *optional*, defaults to `"text"`):
            Name of the text column.
        mask_repetitive_rows (`bool`, *optional*, defaults to `False`):
            Leave out of the loss rows in which a pattern of at most 13 tokens stands 32 times in a row
            (arXiv 2501.00656).
        streaming (`bool`, *optional*, defaults to `False`):
            Read and tokenize during training. Otherwise all data is tokenized first and cached by `datasets`.
        preprocessing_num_workers (`int`, *optional*, defaults to 1):
            Number of tokenization processes (threads when streaming).
        block_rows (`int`, *optional*, defaults to 16384):
            Rows per block. The mixture is exact in each block, and streams are shuffled within blocks.
    """

    datasets: list[str] = field(
        default_factory=list, metadata={"help": "Files, patterns, folders, or HUB/ID[/FOLDER][:CONFIG][@REVISION]."}
    )
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Fractions of the tokens from each dataset; default: equal."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the datasets; default: train."})
    text_column: str = field(default="text", metadata={"help": "Name of the text column."})
    mask_repetitive_rows: bool = field(
        default=False, metadata={"help": "Leave rows that repeat a short pattern 32 times out of the loss."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read and tokenize during training instead of before it."})
    preprocessing_num_workers: int = field(
        default=1, metadata={"help": "Number of tokenization processes (threads when streaming)."}
    )
    block_rows: int = field(
        default=16384,
        metadata={"help": "Rows per block; mixtures are exact in each block, streams are shuffled within blocks."},
    )

    def check(self) -> None:
        """Raises ValueError if a setting is missing, out of range, or contradicts another one."""
        if not self.datasets:
            raise ValueError("Say what to train on: datasets, e.g. allenai/dolmino-mix-1124:dclm or texts.jsonl.")
        weights = self.dataset_weights
        if weights is not None and len(weights) != len(self.datasets):
            raise ValueError(f"There are {len(weights)} dataset_weights for {len(self.datasets)} datasets.")
        for name in ("preprocessing_num_workers", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or larger.")
