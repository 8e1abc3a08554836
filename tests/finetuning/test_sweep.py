"""`hf-sam sweep` from beginning to end."""

import json
import re

import pytest
import yaml
from safetensors.torch import load_file

STEPS = 9


@pytest.fixture(scope="module")
def config(training_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "sft.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(training_files / "model"),
                "dataset": str(training_files / "problems.jsonl"),
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
    return launch("sweep", ["--config", config, "--output_dir", str(output), *flags], **job)


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


def test_each_seed_has_a_sweep_on_the_same_held_out_examples(launch, config, finished, tmp_path):
    job = run(launch, config, tmp_path, "--seeds", "42", "7", ranks=1, strategy="single")
    assert job.status == [0], job.output[0][-3000:]
    one, other = (tmp_path / f"seed-{seed}" for seed in (42, 7))
    assert (one / "held_out.jsonl").read_bytes() == (other / "held_out.jsonl").read_bytes()
    # 42 is the seed that a sweep has without the flag.
    assert difference(weights(finished("single", 1) / "lr-0.002"), weights(one / "lr-0.002")) == 0
    assert difference(weights(one / "lr-0.002"), weights(other / "lr-0.002")) > 1e-4


def test_sam_adapters_rehearsal_and_a_budget_together(launch, config, training_files, tmp_path):
    flags = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "2", "--max_steps", "-1"]
    flags += ["--rehearsal_data", str(training_files / "old.jsonl"), "--rehearsal_share", "0.2"]
    flags += ["--train_tokens", "600", "--num_train_epochs", "1"]
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [0], ended.output[0][-3000:]
    folder = tmp_path / "lr-0.002"
    assert (folder / "adapter_model.safetensors").exists()
    done = json.loads((folder / "training_done.json").read_text())
    state = json.loads((folder / f"checkpoint-{done['steps']}" / "trainer_state.json").read_text())
    assert any(entry.get("sam/sharpness") for entry in state["log_history"])
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 16


def test_a_penalty_holds_the_weights_near_those_of_the_base(launch, config, finished, training_files, tmp_path):
    ended = run(launch, config, tmp_path, "--l2_lambda", "1000")
    assert ended.status == [0], ended.output[0][-3000:]
    base = weights(training_files / "model")
    held, free = (difference(base, weights(folder / "lr-0.002")) for folder in (tmp_path, finished("single", 1)))
    assert 0 < held < free / 2
    state = json.loads((tmp_path / "lr-0.002" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert logged[0]["l2/penalty"] == 0  # of the base itself
    assert all(entry["l2/penalty"] > 0 and entry["sam/sharpness"] for entry in logged[1:])


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
        (["--train_tokens", "some"], "is not a number of tokens"),
        (["--held_out_examples", "160"], "it has 160 examples, no more than held_out_examples=160"),
        (["--prompt_template", "Q:"], "must hold {} once"),
        (["--rehearsal_share", "0.1"], "Rehearsal needs both"),
        (["--learning_rates", "0"], "must be larger than 0"),
        (["--model_name_or_path", "org/model", "--model_revision", "step9"], "revision 'step9' is not in"),
        (["--global_batch_size", "3"], "not a multiple of per_device_train_batch_size=2"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_at_the_start(launch, config, tmp_path, flags, message):
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [2], ended.output[0][-2000:]
    assert re.search(re.escape(message), ended.output[0]), ended.output[0][-2000:]
    assert "Traceback" not in ended.output[0]
