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


@dataclass(repr=False)  # the host's own leaves tokens out
class PretrainingArguments(SAMTrainingArguments):
    """[`SAMTrainingArguments`] with budgets in tokens and sequences instead of steps and micro-batches.

    Parameters:
        train_tokens (`str`, *optional*):
            Tokens to train on: `50B`, `10M`; with `anneal_from` those of the annealing, or a share of the steps
            before it: `10%`. Sets `max_steps`.
        global_batch_size (`int`, *optional*):
            Sequences of an optimizer step over all devices. Sets `gradient_accumulation_steps`.
        sequence_length (`int`, *optional*, defaults to 2048):
            Tokens of a row.
        document_mask (`bool`, *optional*, defaults to `False`):
            Attention stays inside of documents.
        z_loss (`float`, *optional*, defaults to 0):
            Weight of the z-loss; OLMo-2 has 1e-5.
        no_weight_decay (`list[str]`, *optional*):
            Regular expressions of parameter names without weight decay, e.g. `embed_tokens`; all others have it. When
            omitted, the host's rule: none on biases and norms.
        anneal_from (`str`, *optional*):
            A checkpoint of a run at a constant learning rate. Weights, optimizer state and place in the data are
            taken over, and the learning rate decays from there to the end of `train_tokens`.
        num_train_epochs (`float`, *optional*, defaults to 1):
            With `train_tokens`, how many passes over the data the budget may take.

    Raises:
        ValueError: if the budget or the batch cannot be had.
    """

    train_tokens: str | None = field(
        default=None,
        metadata={"help": "Tokens to train on, e.g. 50B or 10M; with anneal_from also a share of its steps: 10%%."},
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of an optimizer step over all devices; sets the accumulation."}
    )
    sequence_length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    document_mask: bool = field(default=False, metadata={"help": "Keep attention inside of documents."})
    z_loss: float = field(default=0.0, metadata={"help": "Weight of the z-loss, the mean square of log Z."})
    no_weight_decay: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions of parameter names without weight decay; all others have it. Default: the "
            "rule of Trainer, none on biases and norms."
        },
    )
    anneal_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint at a constant learning rate to go on from, decaying the rate to the end."},
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the data; with train_tokens, how many the budget may take."}
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
        if isinstance(self.no_weight_decay, str):
            self.no_weight_decay = [self.no_weight_decay]
        # Before the host's own checks: DeepSpeed's "auto" values are filled in there.
        if self.global_batch_size is not None:
            devices = launched_world_size()
            self.gradient_accumulation_steps = accumulation_for(
                self.global_batch_size, self.per_device_train_batch_size, devices
            )
        if self.num_train_epochs < 1 or self.num_train_epochs != int(self.num_train_epochs):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be a whole number of passes.")
        if self.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint would make anew what holds the place in the data. Drop it."
            )
        # The data is in the order of training already.
        self.train_sampling_strategy = "sequential"
        if self.train_tokens is not None:
            self.max_steps = self._steps()
        elif self.max_steps < 1:
            raise ValueError("Say how long to train: train_tokens, e.g. 50B, or max_steps.")
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"One process has {self.n_gpu} GPUs, among which DataParallel would share each batch out. Start one "
                "process for each: accelerate launch SCRIPT ..."
            )

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step over all devices."""
        devices = launched_world_size()
        return self.per_device_train_batch_size * devices * self.gradient_accumulation_steps

    @property
    def first_step(self) -> int:
        """Step of the checkpoint that an annealing begins with, or 0."""
        return 0 if self.anneal_from is None else checkpoint_step(self.anneal_from)

    def _steps(self) -> int:
        first = self.first_step
        share = re.fullmatch(r"([\d.]+)\s*%", str(self.train_tokens).strip())
        if share:
            if self.anneal_from is None:
                raise ValueError(f"train_tokens={self.train_tokens!r} is a share of the steps of anneal_from; set it.")
            steps = math.ceil(first * float(share[1]) / 100)
            if steps < 1:
                raise ValueError(f"train_tokens={self.train_tokens!r} of {first} steps is less than one.")
        else:
            steps = steps_for(parse_tokens(self.train_tokens), self.sequences, self.sequence_length)
        if self.anneal_from is not None:
            self.anneal_steps = steps
        return first + steps


def checkpoint_step(folder: str | Path) -> int:
    """Optimizer steps behind a checkpoint of a Trainer.

    Raises:
        ValueError: if the folder is none.
    """
    folder = Path(folder)
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} is no checkpoint of a training run (it has no trainer_state.json that can be read). Name "
            "a folder checkpoint-N in anneal_from; to start from weights alone, name them in model_name_or_path."
        ) from error
    return int(step)


def checkpoint_hash(folder: str | None) -> str | None:
    """Hash of the log of the run that a checkpoint belongs to; None without one."""
    if folder is None:
        return None
    return fingerprint((Path(folder) / "trainer_state.json").read_bytes())


@dataclass
class ModelArguments:
    """Which model is trained.

    Parameters:
        model_name_or_path (`str`, *optional*): a folder, or an id of the hub; its weights are the start.
        model_revision (`str`, *optional*): branch, tag or commit on the hub.
        config_name (`str`, *optional*): a JSON file or folder with the configuration of a model with random weights.
        tokenizer_name (`str`, *optional*): a folder or an id of the hub; that of the model when omitted.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub id of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration (JSON file or folder) of a model that starts from scratch."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder or hub id; default: the model's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class DataArguments:
    """What it is trained on.

    Parameters:
        datasets (`list[str]`):
            Files, patterns of files, folders, or `HUB/ID[/FOLDER][:CONFIG][@REVISION]`.
        dataset_weights (`list[float]`, *optional*):
            Shares of tokens; equal ones when omitted.
        dataset_split (`str`, *optional*):
            Split of all of them; train when omitted.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of text.
        streaming (`bool`, *optional*, defaults to `False`):
            Read and tokenize while training. Otherwise all is tokenized first, and kept in the cache of `datasets`.
        preprocessing_num_workers (`int`, *optional*, defaults to 1):
            Processes (threads when streaming) that tokenize.
        block_rows (`int`, *optional*, defaults to 16384):
            Rows of a block, in which mixtures are exact and streams are shuffled.
    """

    datasets: list[str] = field(
        default_factory=list, metadata={"help": "Files, patterns, folders, or HUB/ID[/FOLDER][:CONFIG][@REVISION]."}
    )
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of tokens of the datasets; equal ones by default."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the datasets; default: train."})
    text_column: str = field(default="text", metadata={"help": "Column of text."})
    streaming: bool = field(default=False, metadata={"help": "Read and tokenize while training, instead of before it."})
    preprocessing_num_workers: int = field(
        default=1, metadata={"help": "Processes (threads when streaming) that tokenize."}
    )
    block_rows: int = field(
        default=16384, metadata={"help": "Rows of a block, in which mixtures are exact and streams are shuffled."}
    )

    def check(self) -> None:
        """Raises ValueError if something is missing or contradicts something else."""
        if not self.datasets:
            raise ValueError("Say what to train on: datasets, e.g. allenai/dolmino-mix-1124:dclm or texts.jsonl.")
        weights = self.dataset_weights
        if weights is not None and len(weights) != len(self.datasets):
            raise ValueError(f"There are {len(weights)} dataset_weights for {len(self.datasets)} datasets.")
        for name in ("preprocessing_num_workers", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or larger.")
