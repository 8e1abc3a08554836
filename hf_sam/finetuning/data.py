"""Fine-tuning datasets of the papers in the formats of TRL: prompts with completions, conversations, or text."""

import os
from typing import TYPE_CHECKING

import numpy as np

from ..baselines import with_rehearsal
from ..runtime.dataset_specs import open_split
from .settings import SFTDataArguments

if TYPE_CHECKING:
    import datasets

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


def load_examples(data: SFTDataArguments, seed: int) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """The examples to train on, shuffled, and the held-out ones, in the format of TRL.

    Raises:
        ValueError: if the data does not exist, or a column is missing or has the wrong type; the message names it.
    """
    data.check()
    try:
        rows = _rows(data.dataset, data.dataset_split, data.columns, data.stream_examples, seed)
        missing = [name for name in data.columns if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"it has no column {missing[0]!r}, which dataset_format={data.dataset_format!r} reads, only "
                f"{', '.join(map(repr, rows.column_names))}."
            )
        if len(rows) <= data.held_out_examples:
            raise ValueError(f"it has {len(rows)} examples, no more than held_out_examples={data.held_out_examples}.")
        examples = rows.map(
            format_example,
            with_indices=True,
            fn_kwargs={"data": data},
            remove_columns=rows.column_names,
            desc="Formatting examples",
        ).shuffle(seed=seed)
    except ValueError as error:
        raise ValueError(f"Fine-tuning data {data.dataset!r}: {error}") from error
    held_out = examples.select(range(data.held_out_examples))
    return examples.select(range(data.held_out_examples, len(examples))), held_out


def _rows(place: str, split: str | None, columns: list[str], count: int | None, seed: int) -> "datasets.Dataset":
    """All rows of a dataset, or `count` of a stream of it, shuffled within the buffer of the stream."""
    from datasets import Dataset

    if count is None:
        return open_split(place, split, preferred=("train",))
    stream = open_split(place, split, streaming=True, preferred=("train",))
    if set(columns) <= set(next(iter(stream), {})):
        # Other columns may hold values that do not fit into one table.
        stream = stream.select_columns(columns)
    return Dataset.from_list(list(stream.shuffle(seed=seed, buffer_size=10_000).take(count)))


def format_example(row: dict, index: int, data: SFTDataArguments) -> dict:
    """A row as `messages`, as `text`, or as `prompt` and `completion`; `index` counts from 0.

    Raises:
        ValueError: if a column has the wrong type; the message names the row.
    """
    if data.dataset_format == "messages":
        messages = row[data.content_column]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise ValueError(
                f"row {index + 1}: the column {data.content_column!r} must hold lists of messages with role and "
                "content."
            )
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
    for name in data.columns:
        if not isinstance(row[name], str):
            held = "null" if row[name] is None else type(row[name]).__name__
            raise ValueError(f"row {index + 1}: the column {name!r} holds {held} instead of text.")
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
    """The turns of a transcript of Anthropic-HH, which begin with `Human:` and `Assistant:`.

    Raises:
        ValueError: if the transcript does not begin with a turn of `Human:`; the message names `column`.
    """
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


def take_tokens(
    examples: "datasets.Dataset", budget: int, tokenizer, max_length: int | None, workers: int | None = None
) -> tuple["datasets.Dataset", int]:
    """The first examples that have `budget` tokens together, and how many tokens they have.

    Args:
        examples (`datasets.Dataset`): in the format of TRL.
        budget (`int`): tokens.
        tokenizer: of the model.
        max_length (`int`, *optional*): tokens of an example that count, because longer ones are truncated.
        workers (`int`, *optional*): processes that tokenize.

    Raises:
        ValueError: if all examples have fewer tokens.
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


def add_rehearsal(examples: "datasets.Dataset", data: SFTDataArguments, seed: int) -> "datasets.Dataset":
    """The examples with old text mixed in, as completions of an empty prompt.

    Raises:
        ValueError: if the old text has no such column, or is too little; see [`~hf_sam.baselines.with_rehearsal`].
    """
    share = data.rehearsal_share
    # Of a dataset on the hub, no more than are needed.
    count = None if os.path.exists(data.rehearsal_data) else round(len(examples) * share / (1 - share))
    old = _rows(data.rehearsal_data, None, [data.rehearsal_column], count, seed)
    if data.rehearsal_column not in old.column_names:
        raise ValueError(
            f"The old text {data.rehearsal_data!r} has no column {data.rehearsal_column!r}, only "
            f"{', '.join(map(repr, old.column_names))}."
        )
    as_text = "text" in examples.column_names

    def formatted(row):
        text = row[data.rehearsal_column]
        return {"text": text} if as_text else {"prompt": "", "completion": text}

    old = old.map(formatted, remove_columns=[name for name in old.column_names if name != "text" or not as_text])
    return with_rehearsal(examples, old, data.rehearsal_share, seed=seed)
