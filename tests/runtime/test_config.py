"""Config files: merged with the files that they extend, and read by the parsers of all commands."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_sam import commands
from hf_sam.pretraining import DataArguments, ModelArguments, PretrainingArguments
from hf_sam.runtime.config import ConfigParser, DryRunArguments, merge, read_config

COMMANDS = ["sft", "clm", "pretrain", "sweep", "evaluate", "compare", "reproduce", "toy-data"]


def make_parser() -> ConfigParser:
    return ConfigParser((ModelArguments, DataArguments, PretrainingArguments, DryRunArguments), prog="program")


def test_a_file_extends_another_and_flags_win(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-3\nseed: 3\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text("extends: ../base.yaml\nseed: 4\ntokenizer_name: ./here\n")
    argv = ["--config", str(tmp_path / "sub" / "own.yaml"), "--max_steps", "3", "--weight_decay", "0.5", "--dry_run"]
    model, _, args, *_ = make_parser().parse(argv)
    assert (args.learning_rate, args.seed, args.weight_decay) == (1e-3, 4, 0.5)
    assert model.tokenizer_name == str(tmp_path / "sub" / "here")
    (tmp_path / "last.yaml").write_text("seed: 5\n")
    argv[2:2] = [str(tmp_path / "last.yaml")]
    assert make_parser().parse(argv)[2].seed == 5
    assert make_parser().parse([*argv, "--seed", "6"])[2].seed == 6


def test_the_file_above_is_found_from_the_folder_of_this_one_wherever_the_command_starts(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("seed: 3\nname: ./model\n")
    (tmp_path / "sub" / "own.yaml").write_text("extends: ../base.yaml\n")
    (tmp_path / "sub" / "last.yaml").write_text("extends: [./own.yaml]\n")
    for folder in (tmp_path, tmp_path / "sub", Path("/")):
        monkeypatch.chdir(folder)
        found = read_config(os.path.relpath(tmp_path / "sub" / "last.yaml"))
        assert found["seed"] == 3
        assert Path(found["name"]).resolve() == tmp_path / "model"


def test_files_merge_key_by_key_and_null_removes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("runs: {one: {rho: 1, seed: 2}, two: {}, three: null}\nfiles: [x, y]\n")
    Path("b.yaml").write_text("runs: {four: {}}\nfiles: [z]\n")
    Path("c.yaml").write_text("extends: [a.yaml, b.yaml]\nruns: {one: {rho: 3}, two: null}\nname: ./a/../model\n")
    assert read_config("c.yaml") == {
        "runs": {"one": {"rho": 3, "seed": 2}, "three": None, "four": {}},
        "files": ["z"],
        "name": "model",
    }


def test_merging_leaves_both_as_they_are():
    base, changes = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": None, "e": None}
    assert merge(base, changes) == {"a": {"b": 1, "d": 3}, "e": None}
    assert (base, changes) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": None, "e": None})


def test_null_is_the_default_of_what_a_file_extends_and_none_elsewhere(tmp_path):
    @dataclass
    class Arguments:
        length: int | None = field(default=1024, metadata={"help": "Length."})

    parse = lambda file: ConfigParser(Arguments).parse(["--config", str(tmp_path / file)])[0].length  # noqa: E731
    (tmp_path / "base.yaml").write_text("length: 7\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nlength: null\n")
    (tmp_path / "none.yaml").write_text("length: null\n")
    assert [parse(file) for file in ("base.yaml", "own.yaml", "none.yaml")] == [7, 1024, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sam_roh: 0.05\n", r"own.yaml sets 'sam_roh', which is not a setting of program. Did you mean sam_rho\?"),
        ("extends: missing.yaml\n", r"The config file .*missing.yaml cannot be read"),
        ("extends: own.yaml\n", "extends itself"),
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "is not valid YAML"),
        ("env: PATH\n", "own.yaml: env must be a mapping"),
        ("sam_phase: annealing\n", "sam_phase: 'annealing' must be one of all, anneal"),
        ("dataset_weights: [a, b]\n", r"dataset_weights: \['a', 'b'\] is not a list of values"),
        ("seed: many\n", "invalid int value: 'many'"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        make_parser().parse(["--config", str(tmp_path / "own.yaml"), "--max_steps", "1", "--dry_run"])


def test_values_are_converted_as_on_the_command_line(tmp_path):
    # YAML reads 1e-5 and 50B as text, and a single value where the flag takes several.
    (tmp_path / "own.yaml").write_text(
        "learning_rate: 1e-5\ndataset_weights: [1e-1, 2, '3']\nno_weight_decay: embed_tokens\nstreaming: 'yes'\n"
        "train_tokens: 50B\nglobal_batch_size: 8\n"
    )
    _, data, args, _ = make_parser().parse(["--config", str(tmp_path / "own.yaml"), "--dry_run"])
    assert (args.learning_rate, args.no_weight_decay, args.train_tokens) == (1e-5, ["embed_tokens"], "50B")
    assert data.dataset_weights == [0.1, 2, 3.0]
    assert data.streaming is True


def test_a_dry_run_needs_no_gpu(tmp_path):
    argv = ["--max_steps", "1", "--output_dir", str(tmp_path), "--bf16", "true", "--tf32", "false"]
    assert make_parser().parse([*argv, "--dry_run"])[2].use_cpu
    assert not make_parser().parse([*argv[:-4]])[2].use_cpu


def test_a_file_may_set_environment_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_SAM_TEST", raising=False)
    (tmp_path / "base.yaml").write_text("env: {HF_SAM_TEST: 1}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nseed: 3\n")
    argv = ["--config", str(tmp_path / "own.yaml"), "--max_steps", "1", "--dry_run"]
    assert make_parser().parse(argv)[2].seed == 3
    assert os.environ.pop("HF_SAM_TEST") == "1"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_files_that_extend_others(command, tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("nothing_like_a_flag: 1\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\n")
    assert commands.main([command, "--config", str(tmp_path / "own.yaml")]) == 2
    message = "own.yaml sets 'nothing_like_a_flag', which is not a setting of"
    assert capsys.readouterr().err.startswith(f"hf-sam {command}: {tmp_path}/{message} hf-sam {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_mistakes_are_reported_in_a_line(command, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("- a\n")
    for argv, message in (
        (["--confg", "x"], "unrecognized argument --confg. Did you mean --config?"),
        (["--config"], "argument --config: expected"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml cannot be read: No such file"),
        (["--config", str(tmp_path / "own.yaml")], "own.yaml must hold a mapping"),
    ):
        assert commands.main([command, *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"hf-sam {command}: ")
        assert message in line
