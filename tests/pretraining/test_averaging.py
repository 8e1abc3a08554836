"""`ema_decay`: the model of a run is the moving average of its weights."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

STEPS, DECAY = 8, 0.7


@pytest.fixture(scope="module")
def config(training_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(training_files / "model"),
                "datasets": [str(training_files / "text" / "*.jsonl")],
                "train_tokens": str(STEPS * 4 * 16),
                "sequence_length": 16,
                "global_batch_size": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 5e-3,
                "adam_epsilon": 1e-3,
                "lr_scheduler_type": "constant",
                "sam_rho": 0.05,
                "save_steps": 1,
                "save_total_limit": STEPS,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
        )
    )
    return str(path)


def run(launch, config, output, *flags, **job):
    return launch("pretrain", ["--config", config, "--output_dir", str(output), *flags], **job)


@pytest.fixture(scope="module")
def average(launch, config, tmp_path_factory):
    """Of the weights after each step of a run without the average, by the definition."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(launch, config, folder).status == [0]
    found = None
    for step in range(1, STEPS + 1):
        after = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        if found is None:
            found = after
        found = {name: DECAY * found[name] + (1 - DECAY) * value for name, value in after.items()}
    assert (
        max((found[name] - value).abs().max() for name, value in load_file(folder / "model.safetensors").items()) > 1e-3
    )
    return found


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_the_average_replaces_the_weights_also_after_a_kill(launch, config, average, tmp_path, strategy, ranks):
    flags = ["--ema_decay", str(DECAY)]
    killed = run(launch, config, tmp_path, *flags, ranks=ranks, strategy=strategy, kill_at=tmp_path / "checkpoint-5")
    assert -9 in killed.status, killed.output[0][-2000:]
    again = run(launch, config, tmp_path, *flags, ranks=ranks, strategy=strategy)
    assert again.status == [0] * ranks, again.output[0][-3000:]
    found = load_file(tmp_path / "model.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_it_goes_on_on_another_number_of_processes(launch, config, average, tmp_path):
    flags = ["--ema_decay", str(DECAY)]
    run(launch, config, tmp_path, *flags, ranks=2, strategy="ddp", kill_at=tmp_path / "checkpoint-5")
    again = run(launch, config, tmp_path, *flags, "--per_device_train_batch_size", "4")
    assert again.status == [0], again.output[0][-3000:]
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-4)
    assert len(list((tmp_path / "checkpoint-8").glob("weight_average*"))) == 1


def test_an_annealing_begins_an_average_of_its_own(launch, config, tmp_path):
    """After one step, the average is the weights themselves."""
    whole, flags = tmp_path / "whole", ["--ema_decay", str(DECAY), "--train_tokens"]
    assert run(launch, config, whole, "--ema_decay", str(DECAY)).status == [0]
    flags += ["64", "--anneal_from", str(whole / "checkpoint-8"), "--lr_scheduler_type", "linear"]
    annealed, plain = tmp_path / "annealed", tmp_path / "plain"
    ended = run(launch, config, annealed, *flags)
    assert ended.status == [0], ended.output[0][-3000:]
    assert run(launch, config, plain, *flags[2:]).status == [0]
    one, other = (load_file(folder / "model.safetensors") for folder in (annealed, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("flags", "job", "message"),
    [
        (["--ema_decay", "1"], {}, "ema_decay=1.0 must be between 0 and 1"),
        (
            ["--ema_decay", "0.9", "--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1"],
            {},
            "ema_decay replaces the weights at the end, and so does load_best_model_at_end",
        ),
        (["--ema_decay", "0.9"], {"ranks": 2, "strategy": "zero2"}, "ema_decay does not work with DeepSpeed"),
    ],
)
def test_what_has_no_average_is_told(launch, config, tmp_path, flags, job, message):
    ended = run(launch, config, tmp_path, *flags, **job)
    assert 2 in ended.status
    assert message in ended.output[0]
