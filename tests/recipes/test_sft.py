"""`metamath_sft.py` from beginning to end, and the forms of the datasets that it reads."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from sft_data import SFTDataArguments, conversation, load_examples, rehearsed, up_to
from toy_trl import rows, tokenizer

STEPS = 9


@pytest.fixture(scope="module")
def config(shelf_of_recipes, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "sft.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(shelf_of_recipes / "model"),
                "dataset": str(shelf_of_recipes / "problems.jsonl"),
                "held_out_examples": 16,
                "max_length": 24,
                "max_steps": STEPS,
                "global_batch_size": 8,
                "per_device_train_batch_size": 2,
                "learning_rates": ["2e-3"],
                # With its usual epsilon, Adam makes whole steps of gradients that are only rounding.
                "adam_epsilon": 1e-3,
                "sam_rho": 0.05,
                "save_steps": 2,
                "keep_checkpoints": True,
                "logging_steps": 1,
                "gradient_checkpointing": False,
                "bf16": False,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
        )
    )
    return str(path)


def run(launch, config, output, *flags, **job):
    return launch("metamath_sft", ["--config", config, "--output_dir", str(output), *flags], **job)


def weights(folder):
    return load_file(folder / "model.safetensors")


def difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def finished(launch, config, tmp_path_factory):
    """Folders of sweeps that nothing interrupted, by strategy."""
    folders = {}

    def get(strategy, ranks):
        if strategy not in folders:
            folder = tmp_path_factory.mktemp("finished")
            ended = run(launch, config, folder, ranks=ranks, strategy=strategy)
            assert ended.status == [0] * ranks, ended.output[0][-3000:]
            folders[strategy] = folder
        return folders[strategy]

    return get


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 2)])
def test_killed_and_resumed_it_ends_with_the_same_weights(launch, config, finished, tmp_path, strategy, ranks):
    run_of_sweep = tmp_path / "lr-0.002"
    killed = run(launch, config, tmp_path, ranks=ranks, strategy=strategy, kill_at=run_of_sweep / "checkpoint-4")
    assert -9 in killed.status, killed.output[0][-2000:]
    assert not (run_of_sweep / "training_done.json").exists()
    written = (run_of_sweep / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    again = run(launch, config, tmp_path, ranks=ranks, strategy=strategy)
    assert again.status == [0] * ranks, again.output[0][-3000:]
    whole = finished(strategy, ranks) / "lr-0.002"
    assert difference(weights(whole), weights(run_of_sweep)) == 0
    # As on one process. Gradients are summed in another order, which changes some last bits, 1e-7 in weights near 1;
    # a radius that is wrong by a tenth, or other rows, change weights by 1e-3 and more.
    assert difference(weights(finished("single", 1) / "lr-0.002"), weights(whole)) < 1e-5
    assert json.loads((run_of_sweep / "training_done.json").read_text())["steps"] == STEPS
    # It did go on, and not begin again: it would have written the first checkpoint anew.
    assert (run_of_sweep / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == written
    assert again.output[0].count("'loss'") == STEPS - 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_sweep_makes_one_model_a_rate_and_goes_on_with_those_that_are_missing(
    launch, config, finished, tmp_path, strategy
):
    """Two rates on two processes, the second run killed: the first is left alone."""
    flags = ["--learning_rates", "2e-3", "5e-3"]
    killed = run(
        launch, config, tmp_path, *flags, ranks=2, strategy=strategy, kill_at=tmp_path / "lr-0.005" / "checkpoint-2"
    )
    assert -9 in killed.status
    first = (tmp_path / "lr-0.002" / "model.safetensors").stat().st_mtime_ns
    again = run(launch, config, tmp_path, *flags, ranks=2, strategy=strategy)
    assert again.status == [0, 0], again.output[0][-3000:]
    assert (tmp_path / "lr-0.002" / "model.safetensors").stat().st_mtime_ns == first
    # Runs of a sweep do not see one another.
    assert difference(weights(finished(strategy, 2) / "lr-0.002"), weights(tmp_path / "lr-0.002")) == 0
    assert difference(weights(tmp_path / "lr-0.005"), weights(tmp_path / "lr-0.002")) > 1e-3


def test_sam_adapters_rehearsal_and_a_budget_together(launch, config, shelf_of_recipes, tmp_path):
    flags = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "2", "--max_steps", "-1"]
    flags += ["--rehearsal_data", str(shelf_of_recipes / "old.jsonl"), "--rehearsal_share", "0.2"]
    flags += ["--train_tokens", "600", "--num_train_epochs", "1"]
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [0], ended.output[0][-3000:]
    folder = tmp_path / "lr-0.002"
    assert (folder / "adapter_model.safetensors").exists()
    done = json.loads((folder / "training_done.json").read_text())
    state = json.loads((folder / f"checkpoint-{done['steps']}" / "trainer_state.json").read_text())
    assert any(entry.get("sam/sharpness") for entry in state["log_history"])
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 16


def test_other_settings_of_what_is_there_are_refused(launch, config, finished):
    folder = finished("single", 1)
    for flags, message in (
        (["--dataset_format", "text", "--content_column", "prompt"], "dataset_format 'prompt_completion' -> 'text'"),
        (["--use_peft", "true"], "use_peft False -> True"),
        (["--max_length", "20"], "max_length 24 -> 20"),
    ):
        ended = run(launch, config, folder, *flags)
        assert ended.status == [2]
        assert message in ended.output[0], ended.output[0][-2000:]
    assert run(launch, config, folder).status == [0]


def test_only_the_model_is_kept_unless_asked_for_more(launch, config, tmp_path):
    flags = ["--keep_checkpoints", "false", "--packing", "true", "--packing_strategy", "wrapped"]
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [0], ended.output[0][-3000:]
    assert not list((tmp_path / "lr-0.002").glob("checkpoint-*"))
    assert (tmp_path / "lr-0.002" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt_column", "question"], "no column 'question', which dataset_format='prompt_completion' reads"),
        (["--dataset", "missing.jsonl"], "Fine-tuning data 'missing.jsonl': it cannot be loaded"),
        (["--train_tokens", "1M"], "fewer than train_tokens=1,000,000"),
        (["--train_tokens", "some"], "is no number of tokens"),
        (["--held_out_examples", "160"], "it has 160 examples, no more than held_out_examples=160"),
        (["--prompt_template", "Q:"], "must hold {} once"),
        (["--rehearsal_share", "0.1"], "Rehearsal takes both"),
        (["--learning_rates", "0"], "must be larger than 0"),
        (["--model_name_or_path", "org/model", "--model_revision", "step9"], "revision 'step9' is not in"),
        (["--global_batch_size", "3"], "no multiple of per_device_train_batch_size=2"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_at_the_start(launch, config, tmp_path, flags, message):
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [2], ended.output[0][-2000:]
    assert re.search(re.escape(message), ended.output[0]), ended.output[0][-2000:]
    assert "Traceback" not in ended.output[0]


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
        ({"prompt": "a", "completion": None}, {}, "'completion' holds NoneType"),
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
    taken, tokens = up_to(examples, 100, tok, max_length=None)
    assert tokens == sum(lengths[: len(taken)]) >= 100 > sum(lengths[: len(taken) - 1])
    cut, tokens = up_to(examples, 100, tok, max_length=5)
    assert tokens == sum(min(length, 5) for length in lengths[: len(cut)])
    with pytest.raises(ValueError, match=f"has {sum(lengths)} tokens in 40 examples, fewer than train_tokens=9,999"):
        up_to(examples, 9_999, tok, max_length=None)


def test_the_examples_held_out_are_the_same_for_every_model_and_not_trained_on(shelf_of_recipes):
    data = SFTDataArguments(dataset=str(shelf_of_recipes / "problems.jsonl"), held_out_examples=16)
    examples, held_out = load_examples(data, seed=0)
    again = load_examples(data, seed=0)[1]
    assert held_out.to_list() == again.to_list()
    assert len(examples) == 144
    everything = load_dataset("json", data_files=data.dataset, split="train").to_list()
    key = lambda row: (row["prompt"], row["completion"])  # noqa: E731
    assert sorted(map(key, [*examples.to_list(), *held_out.to_list()])) == sorted(map(key, everything))


def test_old_text_is_mixed_in_at_its_share(shelf_of_recipes):
    mix = {"dataset": "x", "rehearsal_data": str(shelf_of_recipes / "old.jsonl"), "rehearsal_share": 0.25}
    mixture = rehearsed(rows("completion", count=60), SFTDataArguments(**mix), seed=0)
    assert len(mixture) == 80
    assert sum(not row["prompt"] for row in mixture) == 20
    assert set(mixture.column_names) == {"prompt", "completion"}
    as_text = rehearsed(rows("text", count=60), SFTDataArguments(**mix, dataset_format="text"), seed=0)
    assert as_text.column_names == ["text"]
    assert len(as_text) == 80
    with pytest.raises(ValueError, match="no column 'body'"):
        rehearsed(rows("text"), SFTDataArguments(**mix, rehearsal_column="body"), seed=0)
