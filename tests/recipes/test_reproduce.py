"""The whole chain at the smallest size, killed in the middle and given again; and what it plans."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce
import torch
import yaml
from toy_data import docstrings

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The toy preset with two ways to anneal and some steps of each stage."""
    folder = tmp_path_factory.mktemp("preset")
    text = folder / "text.txt"
    root = Path(torch.__file__).parent
    files = sorted([*(root / "nn").rglob("*.py"), *root.glob("*.py")])
    text.write_text("\n\n".join(" ".join(text.split()) for file in files for text in docstrings(file)))
    content = yaml.safe_load((RECIPES / "configs" / "presets" / "toy.yaml").read_text())
    content["data"] |= {"text_file": str(text), "problems": 64}
    model = str(RECIPES / "configs" / "models" / "toy.json")
    for kind in ("pretrain", "anneal"):
        content[kind]["settings"]["config_name"] = model
    content["pretrain"]["settings"] |= {"train_tokens": str(12 * 2048), "warmup_steps": 2, "save_steps": 6}
    content["anneal"]["settings"] |= {"train_tokens": "50%", "save_steps": 2, "warmup_steps": 2}
    content["anneal"]["runs"] = {"adamw": {}, "sam": {"sam_rho": 0.4}}
    content["sft"]["settings"] |= {"max_steps": 2, "held_out_examples": 16, "learning_rates": [4e-4, 4e-3]}
    content["evaluate"]["settings"] |= {"max_documents": 8, "quantize": ["rtn3"]}
    path = folder / "smallest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(preset, output):
    command = [sys.executable, str(RECIPES / "reproduce.py"), "--preset", str(preset), "--output_dir", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_the_middle_and_given_again_it_ends_in_one_report(preset, tmp_path):
    output = tmp_path / "killed"
    driver = start(preset, output)
    deadline = time.monotonic() + 600
    while not list(output.glob("anneal/*/checkpoint-*")):
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    subprocess.run(["pkill", "-9", "-f", str(output)])  # the driver and its stages
    driver.communicate()
    assert driver.returncode == -9
    again = start(preset, output)
    said, _ = again.communicate(timeout=800)
    assert again.returncode == 0, said[-3000:]
    assert " of 9 stages are done already." in said
    assert "started data" not in said
    assert "[9/9] report" in said

    summary = json.loads((output / "evaluation" / "summary.json").read_text())
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


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("toy", "139,", "3,276,800 tokens"),
        ("20m", "59,773,184", "4,000,055,296 tokens"),
        ("olmo2-1b", "1,484,916,736", "50,000,297,984"),
    ],
)
def test_a_plan_is_made_without_a_network_or_a_gpu(name, parameters, tmp_path, capsys, tokens):
    assert reproduce.main(["--preset", name, "--dry_run", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert tokens in said
    assert parameters in said
    assert "copy for SAM" in said
    assert "anneal/sam" in said
    assert not list(tmp_path.iterdir())


def test_sweeps_are_split_where_there_are_devices_for_it(tmp_path):
    preset = reproduce.read_preset("olmo2-1b")
    few, many = (reproduce.Experiment(preset, tmp_path, devices).stages() for devices in (2, 8))
    assert sum(stage.name.startswith("sft/") for stage in few) == 2
    assert sum(stage.name.startswith("sft/") for stage in many) == 18
    evaluated = next(stage for stage in many if stage.name == "evaluate/sam")
    assert len(evaluated.needs) == 9
