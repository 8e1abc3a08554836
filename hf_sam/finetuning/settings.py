"""Settings of a fine-tuning sweep: its data, and its runs."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SFTDataArguments:
    """The data to fine-tune on, and the format of its examples.

    Parameters:
        dataset (`str`): a file, a pattern of files, a folder, or `HUB/ID[/FOLDER][:CONFIG][@REVISION]`.
        dataset_split (`str`, *optional*): train when omitted.
        dataset_format (`str`): `prompt_completion` (two columns and their templates), `messages` (a conversation),
            `text`, `alpaca` (instruction, input, output), `hh` (a transcript of Human and Assistant).
        prompt_column, completion_column (`str`): columns of `prompt_completion`.
        prompt_template, completion_template (`str`): templates of `prompt_completion`; `{}` stands for the column.
        content_column (`str`): column of `messages`, `text` and `hh`.
        stream_examples (`int`, *optional*): read this many examples of a large dataset as a stream, instead of all.
        train_tokens (`str`, *optional*): use examples up to this many tokens, e.g. 50M; all when omitted.
        held_out_examples (`int`): number of examples to hold out; task loss is measured on them.
        rehearsal_data (`str`, *optional*): old text to mix in, given like `dataset`.
        rehearsal_column (`str`): its column of text.
        rehearsal_share (`float`): share of old examples in the mixture.
    """

    dataset: str = field(default="", metadata={"help": "File, pattern, folder, HUB/ID[/FOLDER][:CONFIG][@REVISION]."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; default: train."})
    dataset_format: Literal["prompt_completion", "messages", "text", "alpaca", "hh"] = field(
        default="prompt_completion", metadata={"help": "Format of the examples."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of completions."})
    prompt_template: str = field(default="{}", metadata={"help": "Template of prompts; {} stands for the column."})
    completion_template: str = field(
        default="{}", metadata={"help": "Template of completions; {} stands for the column."}
    )
    content_column: str = field(default="text", metadata={"help": "Column of text, messages or transcripts."})
    stream_examples: int | None = field(
        default=None, metadata={"help": "Read this many examples as a stream, instead of all of a large dataset."}
    )
    train_tokens: str | None = field(default=None, metadata={"help": "Use examples up to this many tokens: 50M."})
    held_out_examples: int = field(default=500, metadata={"help": "Examples to hold out, for the task loss."})
    rehearsal_data: str | None = field(default=None, metadata={"help": "Old text to mix in."})
    rehearsal_column: str = field(default="text", metadata={"help": "Column of old text."})
    rehearsal_share: float = field(default=0.0, metadata={"help": "Share of old examples in the mixture."})

    def check(self) -> None:
        """Raises ValueError if a setting is missing or contradicts another one."""
        if not self.dataset:
            raise ValueError("Choose data to fine-tune on: dataset, e.g. meta-math/MetaMathQA or problems.jsonl.")
        for name in ("prompt_template", "completion_template"):
            if getattr(self, name).count("{}") != 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must hold {{}} once, in place of the column.")
        if self.held_out_examples < 0:
            raise ValueError(f"held_out_examples={self.held_out_examples} must not be negative.")
        if (self.rehearsal_share > 0) != (self.rehearsal_data is not None):
            raise ValueError("Rehearsal needs both rehearsal_data and rehearsal_share.")
        if self.rehearsal_share > 0 and self.dataset_format in ("messages", "hh"):
            raise ValueError(
                f"dataset_format={self.dataset_format!r} cannot be mixed with old text, which is not a "
                "conversation. Use prompt_completion, alpaca or text."
            )

    @property
    def columns(self) -> list[str]:
        """Columns that the format reads."""
        named = {
            "prompt_completion": [self.prompt_column, self.completion_column],
            "alpaca": ["instruction", "input", "output"],
        }
        return named.get(self.dataset_format, [self.content_column])


@dataclass
class SweepArguments:
    """The runs of a sweep.

    Parameters:
        learning_rates (`list[float]`): one run for each.
        seeds (`list[int]`): training seeds, one sweep for each; that of `seed` when empty.
        global_batch_size (`int`, *optional*): sequences of an optimizer step over all devices.
        keep_checkpoints (`bool`): keep the checkpoints of a finished run, with its optimizer state.
    """

    learning_rates: list[float] = field(default_factory=list, metadata={"help": "One run for each."})
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "Training seeds: one sweep for each, in OUTPUT/seed-SEED."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of an optimizer step over all devices."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep the checkpoints of a finished run, not only its model."}
    )
