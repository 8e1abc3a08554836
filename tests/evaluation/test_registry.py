"""A new instrument is one registration: its flag, results, tables, plots and callback follow."""

import dataclasses
import json
import re

import pytest
import torch
import toy
from toy_evaluation import held_out

from hf_sam import SAMTrainer, commands
from hf_sam.commands.evaluate import make_parser
from hf_sam.evaluation import EvaluationArguments, Results
from hf_sam.instruments import INSTRUMENTS, Column, Instrument, Plot, Setting, SharpnessCallback, register
from hf_sam.runtime.figure import figure


def picture(results):
    with figure("model", "largest weight") as (render, axes):
        axes.bar(list(results), [found["value"] for found in results.values()])
        return [Plot("largest_weight", "The largest weight of each model", render())]


def largest_weight(model, data, *, batch_size, power):
    with torch.no_grad():
        return {"value": max(param.abs().max().item() for param in model.parameters()) ** power}


@pytest.fixture
def made_up():
    """A made-up instrument, forgotten after the test."""
    before = dict(INSTRUMENTS)
    yield register(
        Instrument(
            name="largest",
            group="extremes",
            help="largest weight",
            measure=largest_weight,
            settings=(Setting("weight_power", 1.0, "Power of the largest weight."),),
            depends_on=(),
            options=lambda settings: {"power": settings.weight_power},
            columns=(Column("largest weight", lambda found: f"{found['value']:.3f}"),),
            note="The largest weight is a made-up instrument.",
            plots=picture,
            scalars=lambda found: {"largest": found["value"]},
        )
    )
    INSTRUMENTS.clear()
    INSTRUMENTS.update(before)


def test_a_made_up_instrument_is_in_flags_results_report_and_comparison(shelf, tmp_path, capsys, made_up):
    with pytest.raises(SystemExit):
        commands.main(["evaluate", "--help"])
    help_text = capsys.readouterr().out
    assert "--extremes" in help_text
    assert "--weight_power" in help_text
    folders = []
    for name, base in (("one", "base"), ("two", "tuned1")):
        folders.append(str(tmp_path / name))
        argv = ["evaluate", "--base", str(shelf / base), "--data", str(shelf / "old.jsonl"), "--max_length", "64"]
        argv += ["--extremes", "largest", "--weight_power", "2", "--max_documents", "4", "--output", folders[-1]]
        assert commands.main(argv) == 0
    results = Results.read(folders[0])
    value = results.result("largest", "base")["value"]
    assert value > 0
    report = (tmp_path / "one" / "report.md").read_text()
    assert "## Extremes" in report
    assert "The largest weight is a made-up instrument." in report
    assert re.search(rf"^\| base\s+\|\s+{value:.3f}\s+\|$", report, re.MULTILINE)
    assert (tmp_path / "one" / "largest_weight.png").read_bytes().startswith(b"\x89PNG")
    assert commands.main(["report", *folders, "--output", str(tmp_path / "both")]) == 0
    comparison = (tmp_path / "both" / "report.md").read_text()
    assert "## Extremes of the base models" in comparison
    assert re.search(rf"^\| one\s+\|\s+{value:.3f}\s+\|$", comparison, re.MULTILINE)
    # The setting decides about the result: with another one, it is another evaluation.
    argv[-1] = folders[0]
    argv[argv.index(str(shelf / "tuned1"))] = str(shelf / "base")
    argv[argv.index("2")] = "3"
    assert commands.main(argv) == 2
    assert "it has --weight_power 2.0, not 3.0" in capsys.readouterr().err


def test_a_made_up_instrument_is_logged_during_training(tmp_path, made_up):
    host = SAMTrainer(model=toy.olmo2(), args=toy.arguments(tmp_path, max_steps=1), train_dataset=toy.token_dataset())
    host.add_callback(SharpnessCallback(host, held_out(4), ("largest",), largest={"power": 1}))
    host.train()
    assert [entry["extremes/largest"] > 0 for entry in host.state.log_history if "extremes/largest" in entry]


def test_without_it_there_is_no_such_flag(shelf):
    with pytest.raises(TypeError, match="extremes"):
        EvaluationArguments(base="x", data=["y"], extremes=["largest"])


def test_names_are_taken_once(made_up):
    with pytest.raises(ValueError, match="already an instrument 'largest'"):
        register(Instrument(name="largest", group="extremes", help="", measure=largest_weight))


def test_an_instrument_that_nothing_selects_is_refused():
    with pytest.raises(ValueError, match="'lonely' needs a group"):
        register(Instrument(name="lonely", help="", measure=largest_weight))


@pytest.mark.parametrize("name", ["seed", "weight_power", "extremes"])
def test_flags_are_taken_once(made_up, name):
    register(dataclasses.replace(made_up, name="other", settings=(Setting(name, 1, ""),)))
    with pytest.raises(ValueError, match=f"named --{name}"):
        EvaluationArguments(base="x", data=["y"])


@pytest.mark.parametrize("value", [True, "largest", ["largest"]])
def test_a_group_without_names_selects_all_of_it(made_up, tmp_path, value):
    """On the command line, in a config file and in Python."""
    assert EvaluationArguments(base="x", data=["y"], extremes=value).extremes == ["largest"]
    (tmp_path / "config.yaml").write_text(json.dumps({"base": "x", "data": "y", "extremes": value}))
    names = [] if value is True else ["largest"]
    for argv in (["--base", "x", "--data", "y", "--extremes", *names], ["--config", str(tmp_path / "config.yaml")]):
        settings, _ = make_parser().parse(argv)
        assert settings.extremes == ["largest"]


def test_every_shipped_instrument_says_what_it_needs():
    for instrument in INSTRUMENTS.values():
        assert instrument.help
        # It is selected by a flag: that of its group, or its own.
        assert instrument.group or instrument.selected
        assert instrument.columns or instrument.plots or instrument.tables or instrument.subject == "variant"
