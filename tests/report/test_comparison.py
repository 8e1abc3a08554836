"""`hf-sam report`: one evaluation again, and several against the first."""

import copy
import json
import re

import pytest

from hf_sam import commands
from hf_sam.evaluation import Results
from hf_sam.instruments import INSTRUMENTS
from hf_sam.report.comparison import comparison_report
from hf_sam.report.summary import cost_of_training
from hf_sam.runtime.figure import styles

TOKENS = [100, 80, 120, 90]


def loss(value, wobble=0.0):
    """A loss as the record holds it, the same for all documents up to `wobble`."""
    losses = [(value + wobble * (-1) ** i) * tokens for i, tokens in enumerate(TOKENS)]
    return {"document_losses": losses, "document_tokens": TOKENS, "loss": value}


def report(*arguments):
    return comparison_report(*arguments)[0]


def record(name, base=3.0, runs=((2.0, 0.2), (1.5, 0.5), (1.0, 1.0)), damage=0.05, wobble=0.0):
    """A record of a sweep with known (task loss, forgetting), as `evaluate` would write it."""

    def part(model, data, value, variant=""):
        return {"part": "loss", "model": model, "data": data, "variant": variant, "result": loss(value, wobble)}

    parts = [part("base", "old", base), part("base", "task", 4.0), part("base", "old", base + damage, "nf4")]
    for i, (task, lost) in enumerate(runs):
        parts += [part(f"run{i}", "old", base + lost), part(f"run{i}", "task", task)]
        parts.append(part(f"run{i}", "old", base + lost, "nf4"))
    for model in ("base", *(f"run{i}" for i in range(len(runs)))):
        held = {"bits": 4.5, "layers": 14, "weights": 100, "kinds": ["Linear4bit"], "left": 0}
        proof = {"part": "quantized", "model": model, "data": "", "variant": "nf4", "result": held}
        parts.append(proof)
    sharp = {
        "kl": {"value": 1e-8, "standard_error": 1e-9},
        "hessian": {"trace": 5.0, "trace_standard_error": None, "eigenvalues": [4.0], "residuals": [0.0]},
    }
    parts += [{"part": kind, "model": "base", "data": "", "variant": "", "result": r} for kind, r in sharp.items()]
    return {
        "name": name,
        "created": "2026-01-01T00:00:00Z",
        "environment": {"command": ["hf-sam"], "torch": "2"},
        "settings": {
            **{setting.name: setting.default for one in INSTRUMENTS.values() for setting in one.settings},
            "quantize": ["nf4"],
            "wise_ft": [],
            "sharpness": ["kl", "hessian"],
            "landscape": [],
            "similarity": [],
            "sam_rho": 0.05,
            "sharpness_documents": 4,
            "seed": 0,
            "dtype": "float32",
        },
        "models": [{"name": n, "spec": n, "fingerprint": n} for n in ("base", *(f"run{i}" for i in range(len(runs))))],
        "data": [
            {"name": "old", "role": "old", "fingerprint": "a", "documents": 4, "tokens": 390},
            {"name": "task", "role": "task", "fingerprint": "b", "documents": 4, "tokens": 390},
        ],
        "quantized": [],
        "parts": parts,
    }


def cells(markdown, *beginning):
    """The row of a table that begins with these cells."""
    for line in markdown.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(row[: len(beginning)]) == beginning:
            return row
    raise AssertionError(f"no row {beginning} in\n{markdown}")


def test_both_what_was_lost_and_where_it_ended():
    """SAM forgets 0.8 as much, from a base that is worse by 0.04."""
    sam = record("SAM", base=3.04, runs=((2.0, 0.16), (1.5, 0.4), (1.0, 0.8)), damage=0.03)
    markdown = report([Results(record("AdamW")), Results(sam)]).markdown()
    assert cells(markdown, "SAM", "base")[2:] == ["3.0400", "0.0400 [0.0400, 0.0400] ✗"]
    assert "## Quantized to nf4" in markdown
    assert cells(markdown, "SAM", "3.0400")[2:] == ["0.0300 [0.0300, 0.0300]", "40.0% [40.0, 40.0] ✓", "3.0700 ✗"]
    # From 1 to 2, on a convex curve: less than the 0.55 of straight lines, and for the other 0.8 times as much.
    row = cells(markdown, "SAM", "1.00 to 2.00")
    lost = [float(value) for value in row[2].split(" -> ")]
    assert lost == pytest.approx([0.533, 0.8 * 0.533], abs=0.001)
    assert row[3].startswith("20.0% [")
    assert [float(value) for value in row[4].split(" -> ")] == pytest.approx([3 + lost[0], 3.04 + lost[1]], abs=2e-4)
    assert cells(markdown, "SAM", "1e-08 ± 1.0e-09")[2:] == ["5 ± unknown"]


def test_sweeps_that_do_not_meet_are_said_to():
    far = record("far", runs=((0.9, 0.1), (0.5, 0.5)))
    markdown = report([Results(record("AdamW")), Results(far)]).markdown()
    assert re.search(r"`far` against `AdamW` at equal task loss: missing\. .*share no task loss", markdown)


def test_other_data_is_refused():
    other = record("other")
    other["data"][0]["fingerprint"] = "c"
    with pytest.raises(ValueError, match="old data 'old' of 'AdamW' and 'other' are not the same tokens"):
        report([Results(record("AdamW")), Results(other)])
    other = record("other")
    other["data"][0]["name"] = "elsewhere"
    with pytest.raises(ValueError, match="on the same data"):
        report([Results(record("AdamW")), Results(other)])
    other = record("other")
    other["settings"]["dtype"] = "bfloat16"
    with pytest.raises(ValueError, match="in float32, 'other' in bfloat16"):
        report([Results(record("AdamW")), Results(other)])
    with pytest.raises(ValueError, match="same name"):
        report([Results(record("AdamW")), Results(record("AdamW"))])


def test_one_document_is_no_inflection():
    records = [record(str(i), runs=((1.0, lost),)) for i, lost in enumerate((1.0, 0.9, 0.95))]
    for one in records:
        for part in one["parts"]:
            if part["part"] == "loss":
                for key in ("document_losses", "document_tokens"):
                    part["result"][key] = part["result"][key][:1]
    markdown = report([Results(one) for one in records], [1, 2, 3]).markdown()
    assert "may be chance" in cells(markdown, "tuned", "none")[2]


def test_sharpness_with_other_settings_is_not_compared():
    other = copy.deepcopy(record("other"))
    other["settings"]["sharpness_documents"] = 8
    markdown = report([Results(record("AdamW")), Results(other)]).markdown()
    assert cells(markdown, "other", "other settings")[1:] == ["other settings"] * 2


def test_inflection_over_checkpoints():
    """Best at equal task: the run with the lowest task loss, which forgets most."""
    ends = {1e9: 4.2, 2e9: 3.9, 3e9: 4.0}
    checkpoints = [
        Results(record(f"{budget:g}", base=3.0 - i / 10, runs=((1.0, end - 3.0 + i / 10), (2.0, 0.01))))
        for i, (budget, end) in enumerate(ends.items())
    ]
    markdown = report(checkpoints, list(ends)).markdown()
    assert cells(markdown, "tuned", "2e+09")[2].startswith("the last checkpoint is worse by 0.1000")
    assert cells(markdown, "base", "none")[2] == "more pretraining never made it worse"
    with pytest.raises(ValueError, match="1 budgets for 3"):
        report(checkpoints, [1.0])


def test_a_rise_that_may_be_chance_is_no_inflection():
    records = [record(str(i), runs=((1.0, lost),)) for i, lost in enumerate((1.0, 0.9, 0.905))]
    # Two documents got much worse, the two others much better.
    (last,) = [
        p["result"] for p in records[2]["parts"] if p["model"] == "run0" and p["data"] == "old" and not p["variant"]
    ]
    last["document_losses"] = [
        value + sign * 10 for value, sign in zip(last["document_losses"], (1, -1, 1, -1), strict=True)
    ]
    markdown = report([Results(one) for one in records], [1, 2, 3]).markdown()
    assert "may be chance: 0.0050" in cells(markdown, "tuned", "none")[2]


def test_the_command(tmp_path, capsys):
    for name in ("AdamW", "SAM"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(record(name)))
    folders = [str(tmp_path / name) for name in ("AdamW", "SAM")]
    assert commands.main(["report", *folders, "--output", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "frontier.png").exists()
    assert commands.main(["report", folders[0]]) == 0
    assert "Evaluation: AdamW" in (tmp_path / "AdamW" / "report.md").read_text()


def test_folders_without_results(tmp_path, capsys):
    assert commands.main(["report", str(tmp_path)]) == 2
    assert "hf-sam evaluate --output" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"name": "x"}')
    assert commands.main(["report", str(tmp_path)]) == 2
    assert "not the record of an evaluation" in capsys.readouterr().err


def test_a_picture_of_what_reductions_cost():
    def trained(name, passes, **settings):
        made = record(name, **settings)
        made["models"][0]["training"] = {"steps": 10, "own_steps": 10, "sam_steps": 5, "passes": passes}
        return Results(made)

    less = {"runs": ((2.0, 0.1), (1.5, 0.25), (1.0, 0.5)), "damage": 0.03}
    runs = [trained("AdamW", 1.0), trained("SAM", 2.0, **less), trained("momentum", 1.0, **less)]
    document, summary = comparison_report(runs)
    assert [cost_of_training(summary, name) for name in summary["runs"]] == [1.0, 2.0, 1.0]
    assert "costs.png" in document.markdown()
    # One run besides the reference is a point, and runs whose training is not known have no cost.
    assert "costs.png" not in comparison_report(runs[:2])[0].markdown()
    unknown = [Results(record(name, **less)) for name in ("a", "b")]
    assert "costs.png" not in comparison_report([runs[0], *unknown])[0].markdown()


def test_each_of_many_methods_has_a_style_of_its_own():
    looks = [(style["color"], style["marker"]) for style in styles(map(str, range(40))).values()]
    assert len(set(looks)) == 40
