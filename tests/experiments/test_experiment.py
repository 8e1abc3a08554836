"""A preset as stages: checkpoints, several ways to fine-tune, several comparisons."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hf_sam.experiments.experiment import Experiment
from hf_sam.experiments.presets import PRESETS, read_preset
from hf_sam.experiments.stages import Chain, Stage

# Its runs of the annealing are `adamw` and `adamw-equal-compute`.
BASE = str(PRESETS.parent / "toy" / "experiment.yaml")


def test_an_annealing_may_begin_with_an_earlier_checkpoint(tmp_path):
    runs = {"last": None, "earlier": {"from": "stable/checkpoint-8", "train_tokens": "50%"}}
    own = {"extends": BASE, "seeds": [3], "anneal": {"runs": runs}}
    own["pretrain"] = {"settings": {"save_steps": 4}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    experiment = Experiment(read_preset(str(tmp_path / "own.yaml")), tmp_path, 1)
    stages = {stage.name: stage for stage in experiment.stages()}
    earlier = stages["anneal/earlier/seed-3"]
    assert earlier.needs == ("pretrain/stable/seed-3",)
    assert "from" not in earlier.settings
    folder = tmp_path / "pretrain" / "stable" / "seed-3"
    with pytest.raises(ValueError, match=r"seed-3 holds no checkpoint-8 to anneal from. Set save_steps"):
        earlier.late_settings()
    for step in (8, 16):
        write_checkpoint(folder / f"checkpoint-{step}")
    assert earlier.late_settings() == {"anneal_from": str(folder / "checkpoint-8")}
    # Part of the settings, so that a finished stage with another step is refused.
    assert earlier.settings["anneal_from"] == str(folder / "checkpoint-8")
    assert "anneal_from" not in stages["anneal/adamw/seed-3"].settings
    assert stages["anneal/adamw/seed-3"].late_settings() == {"anneal_from": str(folder / "checkpoint-16")}
    planned = experiment.plan(lambda command, settings: f"{command} {settings.get('train_tokens')}")
    assert f"anneal/earlier\n\npretrain {8 * 16 * 128 // 2}" in planned


def write_checkpoint(folder: Path) -> None:
    """What tells that a checkpoint is complete."""
    folder.mkdir(parents=True)
    torch.save({}, folder / "rng_state.pth")
    record = {"attributes": {"world_size": 1, "data": None}}
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"CheckpointRecord": record}}))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("stable/last", "must be the name of a pretraining run or one of its checkpoints"),
        ("stable/checkpoint-x", "must be the name of a pretraining run or one of its checkpoints"),
        ("/checkpoint-3", "must be the name of a pretraining run or one of its checkpoints"),
        (3.5, "'3.5' is no run of pretrain, which has stable"),
        ("unstable/checkpoint-400", "is no run of pretrain, which has stable"),
        ("stable/checkpoint-500", "will not be saved, because save_steps is 2000"),
    ],
)
def test_a_checkpoint_that_will_not_be_there_is_refused(place, message, tmp_path):
    own = {"extends": BASE, "anneal": {"runs": {"sam": {"from": place}}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    experiment = Experiment(read_preset(str(tmp_path / "own.yaml")), tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        experiment.stages()
    with pytest.raises(ValueError, match=message):
        experiment.plan(lambda command, settings: "")


def stages_with_tunings(tmp_path: Path, runs: dict) -> dict:
    """The stages of a preset with two ways to anneal, one seed, and these runs of the fine-tuning."""
    anneal = {"runs": {"adamw-equal-compute": None, "sam": {"sam_rho": 0.4}}}
    own = {"extends": BASE, "seeds": [3], "anneal": anneal, "sft": {"runs": runs}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    chain = Chain(Experiment(read_preset(str(tmp_path / "own.yaml")), Path("out"), 1).stages(), tmp_path)
    return {name: stage for name, stage in chain.stages.items() if not name.startswith(("data", "pretrain", "anneal"))}


def test_each_annealed_model_is_fine_tuned_in_each_way_and_all_are_compared(tmp_path):
    stages = stages_with_tunings(tmp_path, {"plain": {}, "lora": {"use_peft": True, "learning_rates": [1e-3]}})
    pairs = [f"{base}/{tuning}/seed-3" for base in ("adamw", "sam") for tuning in ("plain", "lora")]
    assert set(stages) == {*(f"{kind}/{pair}" for kind in ("sft", "evaluate") for pair in pairs), "report"}
    lora, plain = stages["sft/sam/lora/seed-3"], stages["sft/sam/plain/seed-3"]
    assert lora.needs == ("anneal/sam/seed-3",)
    assert lora.settings["model_name_or_path"] == "out/anneal/sam/seed-3"
    assert (lora.settings["use_peft"], lora.settings["learning_rates"], lora.settings["seed"]) == (True, [1e-3], 3)
    assert "use_peft" not in plain.settings
    assert len(plain.settings["learning_rates"]) > 1
    assert stages["report"].settings["runs"] == [
        f"{pair.replace('/', '-')}=out/anneal/{pair.split('/')[0]}/seed-3,out/sft/{pair}" for pair in pairs
    ]
    assert stages["report"].settings["output"] == "out/evaluation"
    assert stages["report"].settings["task_data"] == ["task=out/sft/adamw/plain/seed-3/held_out.jsonl"]
    one = stages["evaluate/sam/lora/seed-3"]
    assert one.needs == ("sft/sam/lora/seed-3",)
    assert one.settings["runs"] == ["sam-lora-seed-3=out/anneal/sam/seed-3,out/sft/sam/lora/seed-3"]


def test_models_that_are_fine_tuned_on_different_data_are_compared_apart(tmp_path):
    stages = stages_with_tunings(tmp_path, {"problems": {}, "code": {"dataset": "code/python.jsonl"}})
    assert {name for name in stages if name.startswith("report")} == {"report/problems", "report/python"}
    report = stages["report/python"]
    assert report.settings["runs"] == [
        f"{base}-seed-3=out/anneal/{base}/seed-3,out/sft/{base}/code/seed-3" for base in ("adamw", "sam")
    ]
    assert report.settings["output"] == "out/evaluation/python"
    assert stages["evaluate/sam/problems/seed-3"].settings["output"] == "out/evaluation/problems"
    assert report.needs == ("evaluate/adamw/code/seed-3", "evaluate/sam/code/seed-3")


@pytest.mark.parametrize("change", [{"dataset": "other/problems.jsonl"}, {"held_out_examples": 8}, {"data_seed": 1}])
def test_runs_of_one_task_hold_out_the_same_examples(tmp_path, change):
    with pytest.raises(
        ValueError, match=r"'plain' and 'other' of sft have a dataset of one name, 'problems', but do not"
    ):
        stages_with_tunings(tmp_path, {"plain": {}, "other": change})
    stages_with_tunings(tmp_path, {"plain": {}, "other": {"learning_rates": [1e-3], "rehearsal_share": 0.1}})


def test_runs_whose_files_would_be_the_same_are_refused(tmp_path):
    stages = [Stage("sft/a/b-c", "", {}), Stage("sft/a-b/c", "", {})]
    with pytest.raises(ValueError, match="'sft/a/b-c' and 'sft/a-b/c' have the same files"):
        Chain(stages, tmp_path)


def test_runs_are_compared_in_the_groups_of_the_preset(tmp_path):
    own = {
        "extends": BASE,
        "seeds": [3],
        "anneal": {"runs": {"sam": {"sam_rho": 0.4}, "adamw-shortened": {"train_tokens": "2.5%"}}},
        "comparisons": {25: ["adamw", "sam"], 50: ["adamw-shortened", "adamw-equal-compute"]},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    stages = {
        stage.name: stage for stage in Experiment(read_preset(str(tmp_path / "own.yaml")), Path("out"), 1).stages()
    }
    assert [name for name in stages if name.startswith("report")] == ["report/25", "report/50"]
    report = stages["report/50"]
    assert [run.split("=")[0] for run in report.settings["runs"]] == [
        "adamw-shortened-seed-3",
        "adamw-equal-compute-seed-3",
    ]
    assert report.settings["output"] == "out/evaluation/50"
    assert report.needs == ("evaluate/adamw-shortened/seed-3", "evaluate/adamw-equal-compute/seed-3")
    assert stages["evaluate/sam/seed-3"].settings["output"] == "out/evaluation/25"
    for groups, message in (
        ({25: ["adamw"]}, "'adamw-equal-compute' is in 0."),
        ({25: [*own["comparisons"][25], "adamw"], 50: own["comparisons"][50]}, "'adamw' is in 2."),
        ({**own["comparisons"], 75: ["sgd"]}, "'sgd' is in 1, and is no run of anneal"),
        ({**own["comparisons"], 75: []}, "comparison 75 has no runs"),
    ):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "comparisons": groups}))
        with pytest.raises(ValueError, match=message):
            read_preset(str(tmp_path / "own.yaml"))
