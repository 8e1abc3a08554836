"""Fine-tuning datasets of the papers in the forms that TRL knows: prompts with completions, conversations, or text."""

import os
from dataclasses import dataclass, field
from typing import Literal

import datasets
import numpy as np

from hf_sam.baselines import with_rehearsal
from hf_sam.runtime.dataset_specs import open_split

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


@dataclass
class SFTDataArguments:
    """What is learned, and how it is written down.

    Parameters:
        dataset (`str`): a file, a pattern of files, a folder, or `HUB/ID[/FOLDER][:CONFIG][@REVISION]`.
        dataset_split (`str`, *optional*): train when omitted.
        dataset_format (`str`): `prompt_completion` (two columns and their templates), `messages` (a conversation),
            `text`, `alpaca` (instruction, input, output), `hh` (a transcript of Human and Assistant).
        prompt_column, completion_column (`str`): of `prompt_completion`.
        prompt_template, completion_template (`str`): what they become; `{}` is the column.
        content_column (`str`): of `messages`, `text` and `hh`.
        stream_examples (`int`, *optional*): read this many examples of a large dataset as a stream, instead of all.
        train_tokens (`str`, *optional*): use examples up to this many tokens, e.g. 50M; all when omitted.
        held_out_examples (`int`): examples that are not trained on, on which learning is measured.
        rehearsal_data (`str`, *optional*): old text to mix in, named as `dataset`.
        rehearsal_column (`str`): its column of text.
        rehearsal_share (`float`): share of old examples in the mixture.
    """

    dataset: str = field(default="", metadata={"help": "File, pattern, folder, HUB/ID[/FOLDER][:CONFIG][@REVISION]."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; default: train."})
    dataset_format: Literal["prompt_completion", "messages", "text", "alpaca", "hh"] = field(
        default="prompt_completion", metadata={"help": "How an example is written down."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of completions."})
    prompt_template: str = field(default="{}", metadata={"help": "What a prompt becomes; {} is the column."})
    completion_template: str = field(default="{}", metadata={"help": "What a completion becomes."})
    content_column: str = field(default="text", metadata={"help": "Column of text, messages or transcripts."})
    stream_examples: int | None = field(
        default=None, metadata={"help": "Read this many examples as a stream, instead of all of a large dataset."}
    )
    train_tokens: str | None = field(default=None, metadata={"help": "Use examples up to this many tokens: 50M."})
    held_out_examples: int = field(default=500, metadata={"help": "Examples kept apart to measure learning on."})
    rehearsal_data: str | None = field(default=None, metadata={"help": "Old text to mix in."})
    rehearsal_column: str = field(default="text", metadata={"help": "Column of old text."})
    rehearsal_share: float = field(default=0.0, metadata={"help": "Share of old examples in the mixture."})

    def check(self) -> None:
        """Raises ValueError if something is missing or contradicts something else."""
        if not self.dataset:
            raise ValueError("Say what to fine-tune on: dataset, e.g. meta-math/MetaMathQA or problems.jsonl.")
        for name in ("prompt_template", "completion_template"):
            if getattr(self, name).count("{}") != 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must hold {{}} once, where the column goes.")
        if self.held_out_examples < 0:
            raise ValueError(f"held_out_examples={self.held_out_examples} must not be negative.")
        if (self.rehearsal_share > 0) != (self.rehearsal_data is not None):
            raise ValueError("Rehearsal takes both rehearsal_data and rehearsal_share.")
        if self.rehearsal_share > 0 and self.dataset_format in ("messages", "hh"):
            raise ValueError(
                f"dataset_format={self.dataset_format!r} cannot be mixed with old text, which is no conversation. Use "
                "prompt_completion, alpaca or text."
            )

    @property
    def columns(self) -> list[str]:
        """Columns that the format reads."""
        named = {
            "prompt_completion": [self.prompt_column, self.completion_column],
            "alpaca": ["instruction", "input", "output"],
        }
        return named.get(self.dataset_format, [self.content_column])


def load_examples(data: SFTDataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The examples to train on, shuffled, and those held out, written down for TRL.

    Raises:
        ValueError: if there is no such data, a column is missing or holds something else; the message names it.
    """
    data.check()
    try:
        rows = _rows(data.dataset, data.dataset_split, data.columns, data.stream_examples, seed)
        missing = [name for name in data.columns if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"it has no column {missing[0]!r}, which dataset_format={data.dataset_format!r} reads, but "
                f"{', '.join(map(repr, rows.column_names))}."
            )
        if len(rows) <= data.held_out_examples:
            raise ValueError(f"it has {len(rows)} examples, no more than held_out_examples={data.held_out_examples}.")
        examples = rows.shuffle(seed=seed).map(
            write_down, fn_kwargs={"data": data}, remove_columns=rows.column_names, desc="Writing examples down"
        )
    except ValueError as error:
        raise ValueError(f"Fine-tuning data {data.dataset!r}: {error}") from error
    held_out = examples.select(range(data.held_out_examples))
    return examples.select(range(data.held_out_examples, len(examples))), held_out


def _rows(place: str, split: str | None, columns: list[str], count: int | None, seed: int) -> datasets.Dataset:
    """All rows of a dataset, or some of a stream of it, shuffled as far as a stream can be."""
    if count is None:
        return open_split(place, split, preferred=("train",))
    stream = open_split(place, split, streaming=True, preferred=("train",))
    if set(columns) <= set(next(iter(stream), {})):
        # Others may hold what does not fit into one table.
        stream = stream.select_columns(columns)
    return datasets.Dataset.from_list(list(stream.shuffle(seed=seed, buffer_size=10_000).take(count)))


def write_down(row: dict, data: SFTDataArguments) -> dict:
    """An example as TRL wants it."""
    if data.dataset_format == "messages":
        messages = row[data.content_column]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise ValueError(f"the column {data.content_column!r} must hold lists of messages with role and content.")
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
    for name in data.columns:
        if not isinstance(row[name], str):
            raise ValueError(f"the column {name!r} holds {type(row[name]).__name__} instead of text.")
    if data.dataset_format == "text":
        return {"text": row[data.content_column]}
    if data.dataset_format == "hh":
        return {"messages": conversation(row[data.content_column], data.content_column)}
    if data.dataset_format == "alpaca":
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        context = ", paired with an input that provides further context" if row["input"] else ""
        prompt = ALPACA.format(context=context, instruction=row["instruction"], given=given)
        return {"prompt": prompt, "completion": row["output"]}
    return {
        "prompt": data.prompt_template.replace("{}", row[data.prompt_column]),
        "completion": data.completion_template.replace("{}", row[data.completion_column]),
    }


def conversation(transcript: str, column: str) -> list[dict]:
    """The turns of a transcript of Anthropic-HH, which begin with `Human:` and `Assistant:`."""
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = []
    for turn in transcript.split("\n\n"):
        speaker, colon, content = turn.partition(":")
        if colon and speaker in roles:
            messages.append({"role": roles[speaker], "content": content.strip()})
        elif messages:
            messages[-1]["content"] += f"\n\n{turn}"
    if not messages or messages[0]["role"] != "user":
        raise ValueError(f"the column {column!r} must hold transcripts that begin with a turn of 'Human:'.")
    return messages


def up_to(examples: datasets.Dataset, budget: int, tokenizer, max_length: int | None, workers: int | None = None):
    """The first examples that have `budget` tokens together, and how many tokens they have.

    Raises:
        ValueError: if all of them have fewer.
    """
    counted = examples.map(
        _count,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=examples.column_names,
        num_proc=workers,
        desc="Counting tokens",
    )
    lengths = np.asarray(counted["tokens"])
    total = np.cumsum(np.minimum(lengths, max_length) if max_length else lengths)
    if total[-1] < budget:
        raise ValueError(
            f"The fine-tuning data has {total[-1]:,} tokens in {len(examples):,} examples, fewer than "
            f"train_tokens={budget:,}. Lower the budget, or leave it out to use all."
        )
    count = int(np.searchsorted(total, budget)) + 1
    return examples.select(range(count)), int(total[count - 1])


def _count(rows: dict, tokenizer) -> dict:
    if "messages" in rows:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows["messages"]]
    elif "text" in rows:
        texts = rows["text"]
    else:
        texts = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
    return {"tokens": [len(ids) + 1 for ids in tokenizer(texts, verbose=False)["input_ids"]]}


def rehearsed(examples: datasets.Dataset, data: SFTDataArguments, seed: int) -> datasets.Dataset:
    """The examples with old text mixed in, as completions of an empty prompt."""
    share = data.rehearsal_share
    # Of the hub's, no more than are needed.
    count = None if os.path.exists(data.rehearsal_data) else round(len(examples) * share / (1 - share))
    old = _rows(data.rehearsal_data, None, [data.rehearsal_column], count, seed)
    if data.rehearsal_column not in old.column_names:
        raise ValueError(
            f"The old text {data.rehearsal_data!r} has no column {data.rehearsal_column!r}, but "
            f"{', '.join(map(repr, old.column_names))}."
        )
    as_text = "text" in examples.column_names

    def written(row):
        text = row[data.rehearsal_column]
        return {"text": text} if as_text else {"prompt": "", "completion": text}

    old = old.map(written, remove_columns=[name for name in old.column_names if name != "text" or not as_text])
    return with_rehearsal(examples, old, data.rehearsal_share, seed=seed)
