"""Fine-tuning datasets in the formats of TRL."""

from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from toy_trl import rows, tokenizer

from hf_sam.finetuning import SFTDataArguments, load_examples
from hf_sam.finetuning.data import add_rehearsal, conversation, take_tokens


def write(folder: Path, *examples: dict) -> str:
    Dataset.from_list(list(examples)).to_json(folder / "data.jsonl")
    return str(folder / "data.jsonl")


def first_example(**settings) -> dict:
    examples, held_out = load_examples(SFTDataArguments(held_out_examples=0, **settings), seed=0)
    assert len(held_out) == 0
    return examples[0]


def test_prompts_and_completions_are_written_into_their_templates(tmp_path):
    path = write(tmp_path, {"query": "1 + {2}?", "response": "3"})
    columns = {"prompt_column": "query", "completion_column": "response"}
    templates = {"prompt_template": "Question: {}\nAnswer:", "completion_template": " {}"}
    assert first_example(dataset=path, **columns, **templates) == {
        "prompt": "Question: 1 + {2}?\nAnswer:",
        "completion": " 3",
    }


def test_alpaca_with_and_without_input(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = write(tmp_path / "a", {"instruction": "Count.", "input": "", "output": "1 2"})
    given = write(tmp_path / "b", {"instruction": "Add.", "input": "1, 2", "output": "3"})
    without = first_example(dataset=plain, dataset_format="alpaca")
    assert without["completion"] == "1 2"
    assert without["prompt"].endswith("### Instruction:\nCount.\n\n### Response:\n")
    assert "### Input" not in without["prompt"]
    assert "### Input:\n1, 2\n\n### Response:\n" in first_example(dataset=given, dataset_format="alpaca")["prompt"]


def test_transcripts_become_conversations(tmp_path):
    transcript = "\n\nHuman: Hi.\n\nMore.\n\nAssistant: Hello: you?\n\nHuman: Bye."
    expected = [
        {"role": "user", "content": "Hi.\n\nMore."},
        {"role": "assistant", "content": "Hello: you?"},
        {"role": "user", "content": "Bye."},
    ]
    assert conversation(transcript, "chosen") == expected
    path = write(tmp_path, {"chosen": transcript})
    assert first_example(dataset=path, dataset_format="hh", content_column="chosen") == {"messages": expected}
    with pytest.raises(ValueError, match="'chosen' must hold transcripts"):
        conversation("just text", "chosen")


@pytest.mark.parametrize(
    ("example", "settings", "message"),
    [
        (
            {"messages": [{"role": "user"}]},
            {"dataset_format": "messages", "content_column": "messages"},
            "'messages' must",
        ),
        ({"prompt": "a", "completion": None}, {}, "row 1: the column 'completion' holds null"),
        ({"text": 3}, {"dataset_format": "text"}, "'text' holds int"),
        ({"instruction": "a"}, {"dataset_format": "alpaca"}, "no column 'input'"),
    ],
)
def test_fields_that_are_wrong_are_named(tmp_path, example, settings, message):
    with pytest.raises(ValueError, match=message):
        first_example(dataset=write(tmp_path, example), **settings)


def test_a_budget_takes_the_first_examples_that_reach_it():
    examples = rows("completion", count=40)
    tok = tokenizer()
    lengths = [len(tok(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in examples]
    taken, tokens = take_tokens(examples, 100, tok, max_length=None)
    assert tokens == sum(lengths[: len(taken)]) >= 100 > sum(lengths[: len(taken) - 1])
    cut, tokens = take_tokens(examples, 100, tok, max_length=5)
    assert tokens == sum(min(length, 5) for length in lengths[: len(cut)])
    with pytest.raises(ValueError, match=f"has {sum(lengths)} tokens in 40 examples, fewer than train_tokens=9,999"):
        take_tokens(examples, 9_999, tok, max_length=None)


def test_the_examples_held_out_are_the_same_for_every_model_and_not_trained_on(training_files):
    data = SFTDataArguments(dataset=str(training_files / "problems.jsonl"), held_out_examples=16)
    examples, held_out = load_examples(data, seed=0)
    again = load_examples(data, seed=0)[1]
    assert held_out.to_list() == again.to_list()
    assert len(examples) == 144
    everything = load_dataset("json", data_files=data.dataset, split="train").to_list()
    key = lambda row: (row["prompt"], row["completion"])  # noqa: E731
    assert sorted(map(key, [*examples.to_list(), *held_out.to_list()])) == sorted(map(key, everything))


def test_old_text_is_mixed_in_at_its_share(training_files):
    mix = {"dataset": "x", "rehearsal_data": str(training_files / "old.jsonl"), "rehearsal_share": 0.25}
    mixture = add_rehearsal(rows("completion", count=60), SFTDataArguments(**mix), seed=0)
    assert len(mixture) == 80
    assert sum(not row["prompt"] for row in mixture) == 20
    assert set(mixture.column_names) == {"prompt", "completion"}
    as_text = add_rehearsal(rows("text", count=60), SFTDataArguments(**mix, dataset_format="text"), seed=0)
    assert as_text.column_names == ["text"]
    assert len(as_text) == 80
    with pytest.raises(ValueError, match="no column 'body'"):
        add_rehearsal(rows("text"), SFTDataArguments(**mix, rehearsal_column="body"), seed=0)
