"""A whole experiment at the smallest size, killed several times and resumed; and what a preset plans."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from hf_sam import commands
from hf_sam.commands.reproduce import find_devices
from hf_sam.experiments.experiment import Experiment
from hf_sam.experiments.presets import PRESETS, read_preset
from hf_sam.experiments.toy_data import docstrings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The toy preset with two ways to anneal and some steps of each stage."""
    folder = tmp_path_factory.mktemp("preset")
    text = folder / "text.txt"
    root = Path(torch.__file__).parent
    files = sorted([*(root / "nn").rglob("*.py"), *root.glob("*.py")])
    text.write_text("\n\n".join(" ".join(text.split()) for file in files for text in docstrings(file)))
    return smallest_preset(folder / "smallest.yaml", text)


def smallest_preset(path: Path, text: Path) -> Path:
    content = yaml.safe_load((PRESETS.parent / "toy" / "experiment.yaml").read_text())
    content["data"] |= {"text_file": str(text), "problems": 64}
    model = str(PRESETS.parent / "models" / "toy.json")
    for kind in ("pretrain", "anneal"):
        content[kind]["settings"]["config_name"] = model
    content["pretrain"]["settings"] |= {"train_tokens": str(12 * 2048), "warmup_steps": 2, "save_steps": 6}
    content["anneal"]["settings"] |= {"train_tokens": "50%", "save_steps": 2, "warmup_steps": 2}
    content["anneal"]["runs"] = {"adamw": {}, "sam": {"sam_rho": 0.4}}
    content["sft"]["settings"] |= {"max_steps": 2, "held_out_examples": 16, "learning_rates": [4e-4, 4e-3]}
    content["evaluate"]["settings"] |= {"max_documents": 8, "quantize": ["rtn3"]}
    path.write_text(yaml.safe_dump(content))
    return path


class Driver:
    """`hf-sam reproduce` in a process of its own."""

    def __init__(self, preset: Path, output: Path, **variables: str):
        command = [sys.executable, "-m", "hf_sam", "reproduce", "--preset", str(preset), "--output_dir", str(output)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(
            [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def wait_for(self, folder: Path, pattern: str) -> None:
        deadline = time.monotonic() + 600
        while not list(folder.glob(pattern)):
            assert self.process.poll() is None, self.process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stages(self) -> list[psutil.Process]:
        """The processes of the stages that run, and what they have started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=800)
        return self.process.returncode, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_the_middle_and_given_again_it_ends_in_one_report(preset, tmp_path):
    output = tmp_path / "killed"
    # The driver and its stages.
    first = Driver(preset, output)
    first.wait_for(output, "anneal/*/checkpoint-*")
    stages = first.stages()
    first.kill()
    for process in stages:
        process.kill()
    # The driver alone: its stage goes on.
    second = Driver(preset, output)
    second.wait_for(output, "anneal/sam/checkpoint-18")
    orphans = second.stages()
    second.kill()
    # A stage alone: the others go on, and the driver reports it.
    third = Driver(preset, output)
    third.wait_for(output, "logs/sft-*.log")
    while not third.stages():
        time.sleep(0.01)
    third.stages()[0].kill()
    status, said = third.end()
    assert status == 1, said[-3000:]
    assert "failed with status -9" in said
    assert not any(process.is_running() and process.status() != "zombie" for process in [*stages, *orphans])

    status, said = Driver(preset, output).end()
    assert status == 0, said[-3000:]
    assert " of 9 stages are done already." in said
    assert "started data" not in said
    assert "[9/9] report" in said

    summary = json.loads((output / "evaluation" / "comparison" / "summary.json").read_text())
    assert set(summary["runs"]) == {"adamw", "sam"}
    for run in summary["runs"].values():
        assert [row["model"] for row in run["sweep"]] == ["lr-0.0004", "lr-0.004"]
    losses = {name: run["base loss"] for name, run in summary["runs"].items()}
    assert losses["adamw"] != losses["sam"]
    assert all(4 < loss < 7 for loss in losses.values())
    assert (output / "evaluation" / "comparison" / "report.html").exists()
    # Each way to anneal went on from the last checkpoint of the one pretraining.
    for name in ("adamw", "sam"):
        state = json.loads((output / "anneal" / name / "checkpoint-18" / "trainer_state.json").read_text())
        assert state["global_step"] == 18
        assert state["stateful_callbacks"]["CheckpointRecord"]["attributes"]["data"]["row"] == 18 * 16


# Two GPUs, for the eyes of the command only: the processes that it launches train on the CPU.
TWO_DEVICES = """
import sys, torch
real = torch.accelerator.is_available
asked_by = lambda: sys._getframe(2).f_globals.get("__name__")
torch.accelerator.is_available = lambda: asked_by() == "hf_sam.commands.reproduce" or real()
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stage_on_all_devices_is_launched_in_a_process_each(preset, tmp_path):
    """And if its launcher is killed, its processes end, and the same command runs it again."""
    (tmp_path / "sitecustomize.py").write_text(TWO_DEVICES)
    content = yaml.safe_load(preset.read_text()) | {"device": "gpu"}
    del content["sft"]
    content["anneal"]["runs"] = {"adamw": {}}
    for kind in ("pretrain", "anneal"):
        content[kind]["settings"] |= {"per_device_train_batch_size": 8, "ddp_backend": "gloo"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": str(tmp_path)}
    output = tmp_path / "out"
    first = Driver(tmp_path / "two.yaml", output, **variables)
    first.wait_for(output, "pretrain/stable/checkpoint-6")
    launcher, *ranks = first.stages()
    assert sum("--stage" in process.cmdline() for process in ranks) == 2
    launcher.kill()
    status, said = first.end()
    assert status == 1
    assert "started pretrain/stable on 0, 1" in said
    psutil.wait_procs(ranks, timeout=60)
    assert not any(map(psutil.Process.is_running, ranks))

    status, said = Driver(tmp_path / "two.yaml", output, **variables).end()
    assert status == 0, said[-3000:]
    assert "started anneal/adamw on 0, 1" in said
    assert "started evaluate/adamw on 0\n" in said
    state = json.loads((output / "anneal" / "adamw" / "checkpoint-18" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["CheckpointRecord"]["attributes"]["world_size"] == 2


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("toy", "86,336", "12,951,552 tokens"),
        ("20m", "59,773,184", "4,000,055,296 tokens"),
        ("olmo2-1b", "1,484,916,736", "50,000,297,984"),
    ],
)
def test_a_plan_is_made_without_a_network_or_a_gpu(name, parameters, tmp_path, capsys, tokens):
    assert commands.main(["reproduce", "--preset", name, "--dry_run", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert tokens in said
    assert parameters in said
    assert "copy for SAM" in said
    assert "anneal/adamw-equal-compute" in said
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_one_stage_a_rate_on_gpus_and_one_stage_on_the_cpu(tmp_path):
    """On any number of devices, so that a scheduler can name the stages."""
    for devices in (2, 8):
        stages = Experiment(read_preset("olmo2-1b"), tmp_path, devices).stages()
        assert sum(stage.name.startswith("sft/") for stage in stages) == 27
        evaluated = next(stage for stage in stages if stage.name == "evaluate/sam")
        assert len(evaluated.needs) == 9
        toy = Experiment({**read_preset("toy"), "seeds": [1]}, tmp_path, devices).stages()
        assert sum(stage.name.startswith("sft/") for stage in toy) == 4


def test_stages_are_listed_after_those_that_they_need(capsys):
    assert commands.main(["reproduce", "--preset", "20m", "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = [name for name, *_ in lines]
    assert ["sft/sam/lr-0.0004", "anneal/sam"] in lines
    for position, (_, *needs) in enumerate(lines):
        assert set(needs) <= set(listed[:position])
    stages = Experiment(read_preset("20m"), Path("outputs"), 8).stages()
    assert sorted(listed) == sorted(stage.name for stage in stages)


def test_the_slurm_example_submits_each_stage_after_those_that_it_needs(tmp_path):
    """The block of the README as it is, with an `sbatch` that notes its arguments and answers with a number."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" >> "$JOBS"; wc -l < "$JOBS" | tr -d " "\n')
    sbatch.chmod(0o755)
    (block,) = re.findall(r"```bash\n(declare .*?)```", (ROOT / "recipes" / "README.md").read_text(), re.DOTALL)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "JOBS": str(tmp_path / "jobs")}
    subprocess.run(["bash", "-eu", "-c", block], env=environment, check=True, timeout=120)
    stages = {stage.name: stage for stage in Experiment(read_preset("20m"), Path("outputs"), 8).stages()}
    jobs = {}
    for number, line in enumerate((tmp_path / "jobs").read_text().splitlines(), start=1):
        name = re.search(r"--stage (\S+)$", line)[1]
        after = re.search(r"--dependency=afterok((?::\d+)+)", line)
        needs = [jobs[int(job)] for job in after[1].split(":")[1:]] if after else []
        assert sorted(needs) == sorted(stages[name].needs)
        assert ("--gpus=8" if stages[name].wide else "--gpus=1") in line.split()
        jobs[number] = name
    assert sorted(jobs.values()) == sorted(stages)


def test_one_stage_is_run_by_name(preset, tmp_path, capsys):
    argv = ["reproduce", "--preset", str(preset), "--output_dir", str(tmp_path), "--stage"]
    assert commands.main([*argv, "pretrain/stable"]) == 2
    assert "'pretrain/stable' needs the stage 'data', which is not finished" in capsys.readouterr().err
    assert commands.main([*argv, "pretraining"]) == 2
    assert "There is no stage 'pretraining'; the stages are data" in capsys.readouterr().err
    for said in ("", "The stage 'data' is done already.\n"):
        assert commands.main([*argv, "data"]) == 0
        assert capsys.readouterr().out == said
    assert (tmp_path / "data" / "problems.jsonl").exists()


def test_a_launcher_is_for_single_stages(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert commands.main(["reproduce", "--preset", "toy", "--output_dir", str(tmp_path)]) == 2
    assert "start it without a launcher" in capsys.readouterr().err


def test_a_run_is_evaluated_on_the_examples_that_its_own_sweep_held_out(tmp_path):
    stages = {stage.name: stage for stage in Experiment(read_preset("olmo2-1b"), tmp_path, 1).stages()}
    assert stages["evaluate/sam"].settings["task_data"] == [f"task={tmp_path}/sft/sam/held_out.jsonl"]
    assert stages["evaluate/sam"].needs[0].startswith("sft/sam/")


def test_gpus_are_asked_for_only_by_presets_that_need_them(monkeypatch):
    assert find_devices({"device": "cpu"}, 3) == ["", "", ""]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_devices({"device": "gpu"}, 3) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert find_devices({"device": "gpu"}, 0) == ["4", "6", "7"]
