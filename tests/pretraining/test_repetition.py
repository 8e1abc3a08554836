"""Rows that repeat a short pattern: found as by looking at every place, and left out of the loss."""

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from toy import olmo2
from toy_trl import tokenizer
from transformers import TrainerCallback

from hf_sam.pretraining import PackedRows
from hf_sam.pretraining.arguments import DataArguments, PretrainingArguments
from hf_sam.pretraining.data import training_data
from hf_sam.pretraining.repetition import MAX_PERIOD, REPETITIONS, is_repetitive
from hf_sam.pretraining.trainer import PretrainingTrainer


def found_place_by_place(tokens: list[int]) -> bool:
    return any(
        tokens[start : start + period] * REPETITIONS == tokens[start : start + period * REPETITIONS]
        for period in range(1, MAX_PERIOD + 1)
        for start in range(len(tokens) - period * REPETITIONS + 1)
    )


@pytest.mark.parametrize("case", range(30))
def test_repetitions_are_those_that_stand_somewhere_in_the_row(case):
    generator = random.Random(case)
    period = generator.randint(1, MAX_PERIOD + 2)
    pattern = [generator.randrange(3) for _ in range(period)]
    repeated = (pattern * (REPETITIONS + 1))[: REPETITIONS * period + generator.choice([-1, 0, 1])]
    around = [[generator.randrange(4, 50) for _ in range(generator.randint(0, 30))] for _ in range(2)]
    tokens = [*around[0], *repeated, *around[1]]
    assert is_repetitive(np.array(tokens)) == found_place_by_place(tokens)


def test_both_answers_occur():
    text = list(range(600))
    assert not is_repetitive(np.array(text))
    assert not is_repetitive(np.array([1] * (REPETITIONS - 1)))
    assert is_repetitive(np.array([1] * REPETITIONS))
    assert is_repetitive(np.array([*text, *list(range(13)) * REPETITIONS, *text]))
    assert not is_repetitive(np.array([*text, *list(range(14)) * REPETITIONS, *text]))


def tokens_in(row: dict) -> list[int]:
    return row["input_ids"].tolist()


def left_out(rows) -> list[bool]:
    return [bool((row["labels"] < 0).all()) for row in rows]


@pytest.mark.parametrize(
    ("length", "expected"),
    # A row of 80 holds 20 of the 40 repetitions of two tokens, one of 160 all of them.
    [(80, [False, False]), (160, [True])],
)
def test_only_their_labels_are_left_out(length, expected):
    documents = [list(range(2, 42)), [5, 6] * 40, list(range(2, 42))]
    packed = Dataset.from_dict({"input_ids": documents}, Features({"input_ids": List(Value("int32"))}))
    plain, masked = (PackedRows(packed, length, padding=0, mask_repetitive=mask) for mask in (False, True))
    rows = [masked[i] for i in range(len(masked))]
    assert left_out(rows) == expected
    assert not any(left_out(plain[i] for i in range(len(plain))))
    assert [token for row in rows for token in tokens_in(row)] == [token for text in documents for token in text]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_flag_reaches_the_rows_and_leaves_their_order(tmp_path, streaming):
    texts = ["w1 w2 " * 60 if i % 3 == 0 else " ".join(f"w{(i * j) % 17}" for j in range(120)) for i in range(30)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def rows(mask):
        args = PretrainingArguments(
            output_dir=str(tmp_path), max_steps=6, sequence_length=121, per_device_train_batch_size=4, use_cpu=True
        )
        data = DataArguments(datasets=[str(path)], streaming=streaming, block_rows=8, mask_repetitive_rows=mask)
        dataset = training_data(data, args, tokenizer()).dataset
        return list(dataset) if streaming else [dataset[i] for i in range(len(dataset))]

    plain, masked = rows(False), rows(True)
    assert [tokens_in(row) for row in plain] == [tokens_in(row) for row in masked]
    assert left_out(masked) == [found_place_by_place(tokens_in(row)) for row in plain]
    assert not any(left_out(plain))
    assert len(set(left_out(masked))) == 2


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_a_step_without_any_label_leaves_finite_weights(tmp_path, sam_rho):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "w1 " * 2000}) + "\n")
    args = PretrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        sequence_length=64,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        z_loss=1e-4,
        sam_rho=sam_rho,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    data = training_data(DataArguments(datasets=[str(path)], mask_repetitive_rows=True), args, tokenizer())
    assert all(left_out(data.dataset[i] for i in range(4, 8)))  # the second step
    model, after_steps = olmo2(), []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after_steps.append([param.detach().clone() for param in model.parameters()])

    PretrainingTrainer(model=model, args=args, data=data, callbacks=[Weights()]).train()
    assert all(torch.isfinite(param).all() for weights in after_steps for param in weights)
