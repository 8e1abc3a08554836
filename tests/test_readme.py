"""What the README shows exists and runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import toy
from toy import olmo2, token_dataset

from hf_sam import SAMArguments
from hf_sam.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_diff_runs_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diff = code_blocks("diff")[0]  # the others change published scripts: see test_scripts.py
    program = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    assert 'output_dir="out"' in program
    program = program.replace('output_dir="out"', 'output_dir="out", use_cpu=True, max_steps=2, report_to="none"')
    names = {"model": olmo2(), "dataset": token_dataset(rows=16)}
    exec(program, names)
    assert names["trainer"].state.global_step == 2
    assert names["args"].sam_rho > 0


def test_the_trainer_made_in_one_line_runs_as_shown(tmp_path, monkeypatch):
    from toy_trl import rows, tokenizer

    monkeypatch.chdir(tmp_path)
    program = next(block for block in code_blocks("python") if "DPOTrainer" in block)
    settings = 'output_dir="out", use_cpu=True, bf16=False, max_steps=1, report_to="none", logging_steps=1'
    names = {"model": olmo2(), "dataset": rows("preference"), "tokenizer": tokenizer()}
    # A model that comes from no hub needs to bring its reference model along.
    program = program.replace('output_dir="out"', settings).replace("model=model,", "model=model, ref_model=other,")
    exec(program, {**names, "other": olmo2(seed=1)} | (shown := {}), shown)
    shown["trainer"].train()
    assert shown["trainer"].state.log_history[0]["sam/sharpness"] != 0


def test_the_loop_of_the_user_runs_as_shown():
    program = next(block for block in code_blocks("python") if "SAMStep" in block)
    model = olmo2()
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": torch.utils.data.DataLoader(token_dataset(rows=16), batch_size=4),
    }
    exec(program.replace("Accelerator(", "Accelerator(cpu=True, "), names)
    assert names["sam"].step == 2
    assert names["sam"].pop_metrics()["sam/sharpness"] > 0
    assert names["loss"].item() > 0


@pytest.mark.parametrize("command", re.findall(r"^hf-sam (?:sft|clm) .*$", README, re.MULTILINE))
def test_the_commands_have_the_flags_that_are_shown(command):
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from hf_sam.commands import clm, sft

    _, name, *argv = shlex.split(command)
    *_, unknown = (
        {"sft": sft, "clm": clm}[name]
        .make_parser()
        .parse_args_into_dataclasses([*argv, "--bf16", "false", "--use_cpu"], return_remaining_strings=True)
    )
    # The rest is for the launcher, which knows it.
    launcher = launch_command_parser().parse_args([*resolve_accelerate_config_argument(unknown), "script.py"])
    assert launcher.training_script == "script.py"


def test_the_measures_run_as_shown(tmp_path, capsys):
    from toy_evaluation import moved, sharp_olmo2
    from toy_trl import rows, tokenizer

    programs = [block for block in code_blocks("python") if "hf_sam.instruments" in block]
    base = sharp_olmo2()
    names = {"dataset": rows("text", count=8), "tokenizer": tokenizer(), "base": base, "tuned": moved(base, 0.02)}
    exec(programs[0], names)
    forgot = float(capsys.readouterr().out.split()[0])
    assert forgot == pytest.approx(names["after"].loss - names["before"].loss, abs=1e-4)
    names["trainer"] = toy.trainer(tmp_path, max_steps=1)
    exec(programs[1], names)
    names["trainer"].train()
    assert "forgetting/forgetting" in names["trainer"].state.log_history[-1]


def test_every_measure_that_is_named_exists():
    import hf_sam.baselines
    import hf_sam.instruments
    import hf_sam.quantizers

    section = README.split("## Measure what it did")[1].split("\n## ")[0]
    table, baselines = section.split("**Baselines**")
    table, quantizers = table.split("### Quantizers")
    schemes = re.findall(r"^\| (`[^|]*`) \|", quantizers, re.MULTILINE)
    assert {name for row in schemes for name in re.findall(r"`([\w-]+)`", row)} == set(QUANTIZERS)
    tables = "\n".join(line for line in table.splitlines() if line.startswith("| "))
    named = set(re.findall(r"`(\w+)[`(]", tables)) - {"evaluate", "hf_sam"}
    named -= {"statistics", "quantizers"}  # packages, in the heading
    assert len(named) >= 20
    assert named <= {*hf_sam.instruments.__all__, *hf_sam.statistics.__all__, *hf_sam.quantizers.__all__}
    assert set(re.findall(r"`(\w+(?:Mixin|_\w+|config))`", baselines)) - {"hf_sam"} <= set(hf_sam.baselines.__all__)


@pytest.mark.parametrize("command", re.findall(r"^hf-sam evaluate .*$", README, re.MULTILINE))
def test_the_evaluations_have_the_flags_that_are_shown(command):
    from hf_sam.commands import evaluate

    settings, _ = evaluate.make_parser().parse(shlex.split(command)[2:])
    assert settings.base


def test_every_flag_is_in_the_table_and_nothing_else():
    other = README.split("### Quantizers")[1].split("**Baselines**")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", README.replace(other, ""), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == set(SAMArguments.__dataclass_fields__)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)\)", README))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:recipes|benchmarks|tests|hf_sam)/[\w/]+\.py", README))))
def test_named_scripts_exist(path):
    assert (ROOT / path).exists()


def test_ci_runs_the_test_command_that_the_readme_shows():
    (command,) = [line for block in code_blocks("bash") for line in block.splitlines() if line.endswith("-m pytest")]
    for step in command.split(" && "):
        assert step in (ROOT / ".ci" / "run").read_text(), step


def test_tested_versions_are_those_of_the_constraint_files():
    for column, file in ((1, "constraints.txt"), (2, "constraints-lowest.txt")):
        pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / file).read_text(), re.MULTILINE))
        for name in ("torch", "transformers", "accelerate", "deepspeed", "trl", "peft", "datasets", "bitsandbytes"):
            row = re.search(rf"^\| {name} \|(.*)\|$", README, re.MULTILINE)[1]
            shown = row.split("|")[column - 1].strip()
            assert (pinned[name] + ".").startswith(shown + "."), (name, shown)
    lower = (ROOT / "pyproject.toml").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    for name, release in pinned.items():
        bounds = re.findall(rf'"{name}>=([\d.]+)"', lower)
        assert bounds, name
        # The first one is that of a dependency; an extra may need a newer one.
        assert (release + ".").startswith(bounds[0] + "."), (name, bounds)
