"""Data by name in `hf-sam sft` and `hf-sam clm`: files, patterns, folders, saved datasets, mixtures."""

import json
import re

import datasets
import pytest
import torch
import trl.scripts.sft
import yaml
from toy_scripts import same, saved, sft_flags
from toy_trl import rows

from hf_sam import SAMSFTConfig
from hf_sam.commands import main
from hf_sam.commands.training_inputs import load_training_data

KINDS = {"sft": "chat", "clm": "text"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same rows in every form that a name may have."""
    folder = tmp_path_factory.mktemp("places")
    for command, kind in KINDS.items():
        train, test = rows(kind), rows(kind, count=8)
        base = folder / command
        base.mkdir()
        train.to_json(base / "train.jsonl")
        test.to_json(base / "test.jsonl")
        train.to_parquet(base / "train.parquet")
        (base / "parts").mkdir()
        for part in range(2):
            train.select(range(32 * part, 32 * part + 32)).to_json(base / "parts" / f"{part}.jsonl")
        train.save_to_disk(base / "saved")
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(base / "saved_splits")
    return folder


def run(command, files, output, place, **settings) -> dict[str, torch.Tensor]:
    argv = sft_flags(files, output, dataset_name=place, sam_rho=0.05, **settings)
    assert main([command, *argv]) == 0
    return saved(output)


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_every_form_of_the_same_rows_trains_the_same_model(files, places, tmp_path, command):
    folder = files / ("chats" if command == "sft" else "corpus")  # as TRL's own loader reads it
    expected = run(command, files, tmp_path / "folder", folder)
    for name in ("train.jsonl", "train.parquet", "parts/*.jsonl", "saved", "saved_splits"):
        trained = run(command, files, tmp_path / re.sub(r"\W", "_", name), places / command / name)
        assert same(trained, expected), name


def test_a_stream_of_a_file_trains_the_same_model(files, places, tmp_path):
    place = places / "sft" / "train.jsonl"
    expected = run("sft", files, tmp_path / "read", place, train_sampling_strategy="sequential")
    assert same(run("sft", files, tmp_path / "stream", place, dataset_streaming="true"), expected)


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_a_file_is_the_train_split_and_the_test_split_takes_a_file_of_its_own(files, places, tmp_path, capsys, command):
    place = places / command
    evaluating = {"eval_strategy": "steps", "eval_steps": 2}
    argv = sft_flags(files, tmp_path, dataset_name=place / "train.jsonl", **evaluating)
    assert main([command, *argv]) == 2
    assert re.search(
        r"train.jsonl' has no split 'test', only 'train'. .*--dataset_test_split FILE", capsys.readouterr().err
    )
    losses = {}
    for name, data, split in (
        ("file", place / "train.jsonl", place / "test.jsonl"),
        ("splits", place / "saved_splits", "test"),
        ("train", place / "saved_splits", "train"),
    ):
        run(command, files, tmp_path / name, data, dataset_test_split=split, save_strategy="steps", **evaluating)
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())
        losses[name] = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses["file"]) == 1
    assert losses["file"] == losses["splits"] != losses["train"]


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_mixtures_take_the_same_names(files, places, tmp_path, command):
    """`datasets` in a config file: the rows of both, in their order."""
    mixtures = {
        "trl": [{"path": "json", "data_files": str(places / command / "parts" / f"{part}.jsonl")} for part in (0, 1)],
        "files": [{"path": str(places / command / "parts" / f"{part}.jsonl")} for part in (0, 1)],
        "pattern": [{"path": str(places / command / "parts" / "*.jsonl")}],
        "saved": [{"path": str(places / command / "saved")}],
    }
    trained = {}
    for name, mixture in mixtures.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"datasets": mixture}))
        argv = sft_flags(files, tmp_path / name, sam_rho=0.05, train_sampling_strategy="sequential")
        index = argv.index("--dataset_name")
        del argv[index : index + 2]
        assert main([command, *argv, "--config", str(config)]) == 0
        trained[name] = saved(tmp_path / name)
    assert all(same(weights, trained["trl"]) for weights in trained.values())


def loaded(tmp_path, mixture=None, columns=("text",), eval_strategy="no", **settings):
    script = trl.ScriptArguments(**settings)
    args = SAMSFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, eval_strategy=eval_strategy, eval_steps=1
    )
    return load_training_data(script, args, trl.DatasetMixtureConfig(datasets=mixture or []), columns)


def test_splits_of_their_own_and_folders_that_are_called_as_splits(tmp_path, monkeypatch):
    for name, count in (("train", 3), ("test", 2)):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(count)))
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    file = {"dataset_name": "both/train.jsonl"}
    with pytest.raises(ValueError, match="has no split 'test', only 'train'"):
        loaded(tmp_path, eval_strategy="steps", **file)
    data = loaded(tmp_path, eval_strategy="steps", dataset_train_split="./both", dataset_test_split="./both", **file)
    assert list(data["train"]["text"]) == ["train 0", "train 1", "train 2"]
    assert list(data["test"]["text"]) == ["test 0", "test 1"]


def test_documents_of_a_text_file_end_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    data = loaded(tmp_path, dataset_name=str(tmp_path / "a.txt"))
    assert list(data["train"]["text"]) == ["one\ntwo", "three"]
    with pytest.raises(ValueError, match=r"'.*a.txt': a mixture reads a text file line by line. Write .* .jsonl"):
        loaded(tmp_path, mixture=[{"path": str(tmp_path / "a.txt")}])


def test_what_is_wrong_with_data_is_reported_with_its_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.jsonl").write_text('{"txt": "b"}\n')
    for settings, message in (
        ({"dataset_name": str(tmp_path / "empty.jsonl")}, "empty.jsonl': the file is empty"),
        ({"dataset_name": str(tmp_path / "*.csv")}, r"\*.csv': it cannot be loaded: there is no such file"),
        ({"mixture": [{"path": str(tmp_path / "empty.jsonl")}]}, "empty.jsonl': the file is empty"),
        ({"dataset_name": str(tmp_path / "a.jsonl")}, "no column 'text', only 'txt'. Choose with --dataset_text_field"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(tmp_path, **settings)


def test_nothing_of_trl_or_datasets_is_patched(files, places, tmp_path):
    before = datasets.load_dataset, trl.get_dataset, trl.scripts.sft.main, trl.SFTTrainer
    run("sft", files, tmp_path, places / "sft" / "train.jsonl")
    assert (datasets.load_dataset, trl.get_dataset, trl.scripts.sft.main, trl.SFTTrainer) == before
