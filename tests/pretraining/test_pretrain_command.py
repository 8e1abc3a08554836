"""`hf-sam pretrain` from beginning to end: on one and two processes, killed and resumed, against a loop by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import olmo2

from hf_sam import commands
from hf_sam.runtime.run_record import read_finished

STEPS = 10
# With its usual epsilon, Adam makes whole steps of gradients that are only rounding.
ADAM_EPSILON = 1e-3
# Largest difference of a weight between runs that sum gradients in another order: some last bits, 1e-7 in weights near
# 1. Without the z-loss or the decay, with a radius that is wrong by a tenth, or SAM a step late, it is 1e-3 and more.
WEIGHT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config(training_files, tmp_path_factory):
    """A file with the settings of a small run: 8 rows of 16 tokens a step, SAM in the second half, checkpoints."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(training_files / "model"),
                "datasets": [str(training_files / "text" / "*.jsonl")],
                "train_tokens": str(STEPS * 8 * 16),
                "sequence_length": 16,
                "global_batch_size": 8,
                "per_device_train_batch_size": 2,
                "block_rows": 24,
                "learning_rate": 5e-3,
                "adam_epsilon": ADAM_EPSILON,
                "lr_scheduler_type": "linear",
                "weight_decay": 0.1,
                "no_weight_decay": ["embed_tokens"],
                "z_loss": 1e-3,
                "sam_rho": 0.05,
                "sam_start_steps": 3,
                "save_steps": 3,
                "logging_steps": 1,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
            }
        )
    )
    return str(path)


def weights(folder):
    return load_file(folder / "model.safetensors")


def run(launch, config, output, *flags, **job):
    return launch("pretrain", ["--config", config, "--output_dir", str(output), *flags], **job)


def logged(folder) -> list[tuple]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry]


def largest_difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


CASES = [
    ("single", 1, False),
    ("single", 1, True),
    ("ddp", 2, True),
    ("fsdp2", 2, False),
    ("zero3", 2, True),
]


@pytest.fixture(scope="module")
def finished(launch, config, tmp_path_factory):
    """Folders of runs that nothing interrupted, by strategy and kind of data."""
    folders = {}

    def get(strategy, ranks, streaming):
        key = strategy, streaming
        if key not in folders:
            folder = tmp_path_factory.mktemp("finished")
            ended = run(launch, config, folder, "--streaming", streaming, ranks=ranks, strategy=strategy)
            assert ended.status == [0] * ranks, ended.output[0][-3000:]
            folders[key] = folder
        return folders[key]

    return get


@pytest.mark.parametrize(("strategy", "ranks", "streaming"), CASES)
def test_killed_and_resumed_it_ends_with_the_same_weights(
    launch, config, finished, tmp_path, strategy, ranks, streaming
):
    """SIGKILL while it writes a checkpoint; the same command again."""
    flags = ["--streaming", streaming]
    # Seen as soon as the host begins to write the second checkpoint, so the first one counts.
    killed = run(launch, config, tmp_path, *flags, ranks=ranks, strategy=strategy, kill_at=tmp_path / "checkpoint-6")
    assert -9 in killed.status, killed.output[0][-2000:]
    assert not (tmp_path / "training_done.json").exists()
    written = (tmp_path / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns
    again = run(launch, config, tmp_path, *flags, ranks=ranks, strategy=strategy)
    assert again.status == [0] * ranks, again.output[0][-3000:]
    whole = finished(strategy, ranks, streaming)
    assert largest_difference(weights(whole), weights(tmp_path)) == 0
    # It did go on, and not begin again: it would have written the first checkpoint anew.
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns == written
    assert again.output[0].count("'loss'") == STEPS - 3
    states = [
        json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for folder in (whole, tmp_path)
    ]
    losses = [[(e["step"], e["loss"], e["grad_norm"]) for e in s["log_history"] if "loss" in e] for s in states]
    assert losses[0] == losses[1]
    assert [step for step, *_ in losses[1]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("strategy", "ranks", "streaming"), CASES[2:])
def test_the_same_rows_in_the_same_order_on_two_processes(finished, strategy, ranks, streaming):
    alone = weights(finished("single", 1, streaming))
    assert largest_difference(alone, weights(finished(strategy, ranks, streaming))) < WEIGHT_TOLERANCE
    start = olmo2().state_dict()
    assert largest_difference(alone, start) > 1e-2


def test_a_loop_by_hand_ends_with_the_same_weights(finished, training_files, config):
    """Rows, z-loss, SAM, decay of all but the embeddings, schedule: against the plain step."""
    from toy_pretraining import read_documents, tokens_of
    from toy_trl import tokenizer

    from hf_sam.pretraining import Mixture, PackedStream, TextSource, TokenStream

    settings = yaml.safe_load(Path(config).read_text())
    pattern = settings["datasets"][0]
    everything = {tuple(tokens_of(file, tokenizer())) for file in read_documents(pattern)}
    stream = TokenStream(TextSource(pattern), tokenizer(), seed=42)
    rows = list(PackedStream([stream], Mixture([1.0], 24, seed=42), length=16, rows=STEPS * 8))
    first = tuple(TokenStream(TextSource(pattern), tokenizer(), seed=42).take(60)[0].tolist())
    assert any(file[:60] == first for file in everything)

    model = olmo2().train()
    embedding = [p for n, p in model.named_parameters() if "embed_tokens" in n]
    others = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": embedding, "weight_decay": 0.0}],
        lr=5e-3,
        eps=ADAM_EPSILON,
    )

    def loss_of(batch):
        logits = model(input_ids=batch).logits[:, :-1]
        targets = batch[:, 1:].flatten()
        cross = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        return cross + 1e-3 * torch.logsumexp(logits, -1).square().mean()

    for step in range(STEPS):
        batch = torch.stack([row["input_ids"] for row in rows[8 * step : 8 * step + 8]])
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss_of(batch).backward()
        if step >= 3:
            params = list(model.parameters())
            kept = [p.detach().clone() for p in params]
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            with torch.no_grad():
                for p in params:
                    p.add_(0.05 * p.grad / norm)
            optimizer.zero_grad()
            loss_of(batch).backward()
            with torch.no_grad():
                for p, value in zip(params, kept, strict=True):
                    p.copy_(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert largest_difference(weights(finished("single", 1, True)), model.state_dict()) < WEIGHT_TOLERANCE


def test_a_run_that_is_done_is_left_alone_and_other_settings_are_refused(launch, config, finished, tmp_path):
    shutil.copytree(finished("single", 1, True), tmp_path / "done")
    before = (tmp_path / "done" / "model.safetensors").stat().st_mtime_ns
    again = run(launch, config, tmp_path / "done", "--streaming", True)
    assert again.status == [0]
    assert (tmp_path / "done" / "model.safetensors").stat().st_mtime_ns == before
    other = run(launch, config, tmp_path / "done", "--streaming", True, "--sam_rho", 0.1)
    assert other.status == [2]
    assert "holds a run with other settings (sam_rho 0.05 -> 0.1)" in other.output[0]


def test_annealing_goes_on_from_a_checkpoint_with_its_optimizer_and_its_place_in_the_data(
    launch, config, tmp_path, finished
):
    """Stable for six steps, then annealed in four: the same weights as in one run with that schedule."""
    for streaming in (True, False):
        folder = tmp_path / str(streaming)
        common = ["--streaming", streaming, "--sam_start_steps", "0", "--save_steps", "6"]
        stable = ["--lr_scheduler_type", "constant", "--train_tokens", 6 * 8 * 16]
        ended = run(launch, config, folder / "stable", *common, *stable)
        assert ended.status == [0], ended.output[0][-3000:]
        annealed = [*common, "--anneal_from", folder / "stable" / "checkpoint-6", "--train_tokens", "60%"]
        ended = run(launch, config, folder / "annealed", *annealed)
        assert ended.status == [0], ended.output[0][-3000:]
        whole = run(launch, config, folder / "whole", *common, "--anneal_steps", "4")
        assert whole.status == [0], whole.output[0][-3000:]
        assert largest_difference(weights(folder / "whole"), weights(folder / "annealed")) == 0


def test_plan_and_run_of_an_annealing_agree_about_when_sam_acts(launch, config, finished, tmp_path, capsys):
    """A share is one of the steps of the annealing, not of those before its checkpoint."""
    checkpoint = finished("single", 1, True) / "checkpoint-3"
    flags = ["--streaming", "true", "--anneal_from", str(checkpoint), "--train_tokens", str(4 * 8 * 16)]
    flags += ["--sam_start_steps", "0.75"]
    ended = run(launch, config, tmp_path, *flags)
    assert ended.status == [0], ended.output[0][-3000:]
    assert read_finished(tmp_path) == {"steps": 7, "own_steps": 4, "sam_steps": 1, "passes": 1.25}
    logs = json.loads((tmp_path / "checkpoint-7" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logs if "sam/sharpness" in entry and entry["step"] > 3] == [7]
    planned = commands.main(["pretrain", "--config", config, "--output_dir", str(tmp_path), *flags, "--dry_run"])
    assert planned == 0
    assert "with SAM (1.25 x)" in capsys.readouterr().out


def test_a_saved_dataset_is_resumed_and_a_plain_trainers_checkpoint_is_annealed(
    launch, config, training_files, finished, tmp_path
):
    """`datasets` keeps its cache in the folder of the data; other trainers write no record into checkpoints."""
    import datasets

    texts = datasets.load_dataset("json", data_files=str(training_files / "text" / "*.jsonl"), split="train")
    texts.save_to_disk(tmp_path / "saved")
    flags = ["--datasets", str(tmp_path / "saved"), "--streaming", "false"]
    killed = run(launch, config, tmp_path / "run", *flags, kill_at=tmp_path / "run" / "checkpoint-6")
    assert -9 in killed.status
    again = run(launch, config, tmp_path / "run", *flags)
    assert again.status == [0], again.output[0][-3000:]

    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(tmp_path / "run" / "checkpoint-3", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["CheckpointRecord"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    annealed = [*flags, "--anneal_from", checkpoint, "--train_tokens", "512"]
    ended = run(launch, config, tmp_path / "annealed", *annealed)
    assert ended.status == [0], ended.output[0][-3000:]
    # Another checkpoint in its place makes another run.
    (checkpoint / "trainer_state.json").write_text(json.dumps(state, indent=1))
    changed = run(launch, config, tmp_path / "annealed", *annealed)
    assert changed.status == [2]
    assert "annealed '" in changed.output[0]


def test_a_checkpoint_that_cannot_be_annealed_from_is_refused(launch, config, finished, tmp_path):
    """The host would begin with the warmup again, and never reach the decay."""
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(finished("single", 1, True) / "checkpoint-3", checkpoint)
    annealed = ["--streaming", "true", "--anneal_from", checkpoint, "--train_tokens", "256"]
    other_rate = run(launch, config, tmp_path / "a", *annealed, "--learning_rate", "1e-3")
    assert other_rate.status == [2]
    assert "was trained at a learning rate of 0.005" in other_rate.output[0]
    (checkpoint / "scheduler.pt").unlink()
    weights_only = run(launch, config, tmp_path / "b", *annealed)
    assert weights_only.status == [2]
    assert "has no optimizer and scheduler state of step 3" in weights_only.output[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_tokens", "lots"], "train_tokens='lots' is not a number of tokens"),
        (["--train_tokens", "100"], "less than the 128 tokens of one optimizer step"),
        (["--train_tokens", "10M"], r"has at most .* tokens .*but the run takes 10,000,000"),
        (
            ["--train_tokens", "10M", "--streaming", "false"],
            "12,709 tokens, but .* takes 10,000,000 of it: 786.2 passes",
        ),
        (["--global_batch_size", "3"], "not a multiple of per_device_train_batch_size=2 on 1 device"),
        (["--text_column", "body"], "no column 'body', only 'text'"),
        (["--datasets", "nothing.jsonl"], "Training data 'nothing.jsonl'"),
        (["--dataset_weights", "1", "2"], "2 dataset_weights for 1 datasets"),
        (
            ["--model_name_or_path", "org/model", "--model_revision", "step9"],
            "at revision 'step9' is not in the local cache",
        ),
        (["--no_weight_decay", "nothing_like_it"], "matches no parameter"),
        (["--sequence_length", "64"], "more than the 32 positions of the model"),
        (["--anneal_from", "."], "is not a checkpoint of a training run"),
        (["--train_tokens", "10%"], "is a percentage of the steps of anneal_from"),
        (["--num_train_epochs", "0.5"], "must be a whole number of passes"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_at_the_start(launch, config, tmp_path, flags, message):
    import re

    ended = run(launch, config, tmp_path, "--streaming", "true", *flags)
    assert ended.status == [2], ended.output[0][-2000:]
    assert re.search(message, ended.output[0]), ended.output[0][-2000:]
    assert "Traceback" not in ended.output[0]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_is_told_at_the_start(training_files, config, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert commands.main(["pretrain", "--config", config, "--output_dir", str(tmp_path)]) == 2
    assert "No disk space: the model and 4 checkpoints" in capsys.readouterr().err


def test_other_data_in_the_middle_of_a_run_is_refused(launch, config, finished, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(finished("single", 1, True), folder)
    (folder / "training_done.json").unlink()
    for flags, message in (
        (["--seed", "7"], "seed 42 -> 7"),
        (["--global_batch_size", "16"], "sequences 8 -> 16"),
        (["--z_loss", "0"], "z_loss 0.001 -> 0.0"),
    ):
        ended = run(launch, config, folder, "--streaming", "true", *flags)
        assert ended.status == [2]
        assert message in ended.output[0], ended.output[0]


def test_text_that_changed_on_the_disk_is_refused(launch, config, training_files, tmp_path):
    shutil.copytree(training_files / "text", tmp_path / "text")
    flags = ["--datasets", str(tmp_path / "text" / "*.jsonl"), "--streaming", "true"]
    killed = run(launch, config, tmp_path / "run", *flags, kill_at=tmp_path / "run" / "checkpoint-6")
    assert -9 in killed.status
    with (tmp_path / "text" / "part-0.jsonl").open("a") as file:
        file.write('{"text": "w1 w2"}\n')
    ended = run(launch, config, tmp_path / "run", *flags)
    assert ended.status == [2]
    assert "holds a run with other settings (data_and_tokenizer '" in ended.output[0]


@pytest.mark.slow
def test_the_launcher_reads_the_accelerate_configs(config, tmp_path):
    """`accelerate launch --config_file`, on the CPU: DDP, ZeRO-2 and ZeRO-3 log the same losses.

    Up to 1e-4, of losses near 4: gradients are summed in another order on each.
    """
    configs = Path(__file__).parents[2] / "recipes" / "configs" / "accelerate"
    ways = {"ddp": ["--cpu", "--num_machines", "1"]}
    ways |= {name: ["--config_file", str(configs / f"{name}.yaml")] for name in ("zero2", "zero3")}
    recipe = str(configs.parents[1] / "olmo_mid_sam.py")
    losses = {}
    for name, flags in ways.items():
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *flags]
        launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        argv = ["--config", config, "--streaming", "true", "--output_dir", str(tmp_path / name)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, recipe, *argv], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = [loss for _, loss, _ in logged(tmp_path / name)]
    assert len(losses["ddp"]) == STEPS
    for name in ("zero2", "zero3"):
        assert losses[name] == pytest.approx(losses["ddp"], abs=1e-4)
