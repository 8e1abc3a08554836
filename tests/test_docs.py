"""Documents beside the README: their links, and what they say about the code."""

import json
import re
from pathlib import Path

import pytest
from test_architecture import FACE, LAYERS

from hf_sam.commands import main
from hf_sam.commands.suggest_rho import STARTS
from hf_sam.experiments.presets import read_preset
from hf_sam.report.summary import cost_of_training
from hf_sam.report.tables import estimate, negative
from hf_sam.runtime.config import read_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def links(document: Path) -> set[str]:
    return set(re.findall(r"\]\((?!http|#)([^)#\s]+)(?:#[\w-]+)?\)", document.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    assert not [link for link in links(document) if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    pattern = r"`((?:hf_sam|tests|recipes|docs|benchmarks)/[\w./-]+\.(?:py|md|yaml))`"
    named = set(re.findall(pattern, document.read_text(encoding="utf-8")))
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_the_architecture_has_each_package_in_its_picture_and_a_paragraph_about_it():
    picture = ARCHITECTURE.split("```")[1]
    assert re.findall(r"^ (\w+) ", picture, re.MULTILINE) == list(LAYERS)
    assert set(re.findall(r"^\*\*(\w+)\*\*", ARCHITECTURE, re.MULTILINE)) == set(LAYERS)
    for module in FACE:
        assert module in picture


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "face"])
def test_modules_that_a_paragraph_names_are_in_that_package(layer):
    paragraph = re.search(rf"^\*\*{layer}\*\*.*?(?=\n\n)", ARCHITECTURE, re.MULTILINE | re.DOTALL)[0]
    for name in re.findall(r"`([\w/]+\.py)`", paragraph):
        folder = ROOT / "hf_sam" / layer
        assert (folder / name).exists() or (folder.parent / name).exists() or list(folder.rglob(name)), name


COST = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")


def table_that_begins(text: str, header: str) -> list[list[str]]:
    """Cells of the first table whose header begins so, without the rule."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| -")]


def test_what_each_way_buys_is_the_table_of_the_report():
    report = (ROOT / "recipes" / "results" / "toy-cost" / "report.md").read_text(encoding="utf-8")
    found = table_that_begins(COST, "| run    ")
    assert found == table_that_begins(report[report.index("## All runs") :], "| run")
    assert len(found) == 12


@pytest.mark.parametrize("name", ["toy", "toy-cost", "toy-cost/equal-compute", "toy-interval", "toy-controls"])
def test_the_tables_of_each_report_are_those_of_its_numbers(name, capsys):
    """By the command that a reader would give."""
    folder = ROOT / "recipes" / "results" / name
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    written = (folder / "report.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^## .*", printed, re.MULTILINE):
        tables = [
            re.findall(r"^\|.*", text.split(heading, 1)[1].split("\n## ")[0], re.MULTILINE)
            for text in (printed, written)
        ]
        assert tables[0] == tables[1], heading
        assert tables[0]


def differences(summary: dict) -> list[list[str]]:
    """Where each run ended minus where the reference did, a row each, the best after fine-tuning and NF4 first."""
    rows = []
    for name, run in summary["runs"].items():
        if name != summary["reference"]:
            both = run["fine-tuned and quantized"]
            found = [run["fine-tuned"], both["nf4"], both["rtn3"], run["quantized"]["nf4"], run["quantized"]["rtn3"]]
            rows.append([name, *(str(estimate(one["loss difference"], "+.3f", less_is_better=True)) for one in found)])
    return sorted(rows, key=lambda row: float(row[2].split()[0]))


def test_where_runs_end_against_equal_compute_is_that_of_its_report():
    found = differences(numbers_of("toy-cost/equal-compute"))
    assert table_that_begins(COST, "| against `adamw-equal-compute`")[1:] == found


def reductions(summary: dict) -> list[list[str]]:
    """What each run loses less than the reference, and how much lower it ended after fine-tuning, a row each."""
    rows = []
    for name, run in summary["runs"].items():
        if name != summary["reference"]:
            tuned, quantized = run["fine-tuned"], run["quantized"]
            found = [tuned["reduction"], quantized["nf4"]["reduction"], quantized["rtn3"]["reduction"]]
            cells = [estimate(one, ".0f", "%", less_is_better=False) for one in found]
            ends = estimate(negative(tuned["loss difference"]), "+.3f", less_is_better=False)
            rows.append([f"{cost_of_training(summary, name):.2f}x", *map(str, cells), str(ends)])
    return rows


def numbers_of(name: str) -> dict:
    return json.loads((ROOT / "recipes" / "results" / name / "summary.json").read_text(encoding="utf-8"))


def test_the_quickstart_is_its_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = (ROOT / "recipes" / "results" / "toy" / "report.md").read_text(encoding="utf-8")
    found = table_that_begins(readme, "| run    ")
    assert found == table_that_begins(report[report.index("## All runs") :], "| run")
    assert len(found) == 1 + len(read_preset("toy")["anneal"]["runs"])
    run = numbers_of("toy")["runs"]["momentum-noise"]
    text = " ".join(readme.split())
    assert "forgets {value:.0f}% less at equal task loss, and loses".format(**run["fine-tuned"]["reduction"]) in text
    for scheme, bits in (("nf4", 4), ("rtn3", 3)):
        assert "{value:.0f}% less to {bits} bits".format(**run["quantized"][scheme]["reduction"], bits=bits) in text
    assert "it ends {value:.3f} nats higher on the mean".format(**run["fine-tuned"]["loss difference"]) in text


def test_the_figures_of_the_readme_are_those_of_the_reports():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    run = numbers_of("toy-cost")["runs"]["momentum-noise"]
    for reduction, what in (
        (run["fine-tuned"]["reduction"], "forgets {value:.0f}% less [{low:.0f}, {high:.0f}]"),
        (run["quantized"]["nf4"]["reduction"], "loses {value:.0f}% less [{low:.0f}, {high:.0f}] to 4 bits"),
    ):
        assert what.format(**reduction) in readme
    run = numbers_of("toy-cost/equal-compute")["runs"]["momentum-noise"]
    ends = negative(run["fine-tuned and quantized"]["nf4"]["loss difference"])
    assert "lower by {value:.3f} nats [{low:.3f}, {high:.3f}] than that of AdamW".format(**ends) in readme
    assert (
        "as a base in NF4, it is higher by {value:.3f}".format(**run["quantized"]["nf4"]["loss difference"]) in readme
    )


def test_the_controls_are_those_of_their_report():
    summary = numbers_of("toy-controls")
    rows = table_that_begins(COST, "| in these steps | run")[1:]
    assert [row[1].strip("`") for row in rows] == list(summary["runs"])[1:]
    assert [row[2:] for row in rows] == [row[1:] for row in reductions(summary)]


def test_the_map_is_that_of_its_report_and_its_preset():
    summary = numbers_of("toy-interval")
    preset = read_preset("toy-interval")["anneal"]["runs"]
    assert list(preset) == list(summary["runs"])
    rows = table_that_begins(COST, "| every | `sam_rho`")[1:]
    assert [row[3:] for row in rows] == reductions(summary)
    for row, run in zip(rows, list(preset.values())[1:], strict=True):
        share = "a quarter" if "sam_ascent_micro_batches" in run else "all"
        clipped = ", not clipped" if run.get("max_grad_norm") == 0 else ""
        assert row[:3] == [f"{run.get('sam_interval', 1)}{clipped}", str(run["sam_rho"]), share]


def test_settings_of_the_runs_are_those_of_the_preset():
    runs = read_config(ROOT / "hf_sam" / "experiments" / "configs" / "presets" / "toy-cost.yaml")["anneal"]["runs"]
    sam = {name: {k: str(v) for k, v in run.items() if k.startswith("sam_")} for name, run in runs.items()}
    rows = {
        row[0].strip("`"): dict(re.findall(r"`(sam_\w+)=([\w.]+)`", row[1]))
        for row in table_that_begins(COST, "| run | settings")[1:]
    }
    assert {"adamw": {}, **rows} == sam


def test_rises_of_the_starting_values_are_those_of_suggest_rho():
    names = ["SAM in every step", "SAM in every 10th step", "ASAM in every 10th step", "momentum", "noise"]
    rises = {start.what: "".join(f"{rise:g}" for rise in start.rises.values()) for start in STARTS}
    assert table_that_begins(COST, "| model | ")[1][1:] == [rises[name] for name in names]
