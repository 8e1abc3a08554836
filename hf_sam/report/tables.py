"""The tables of a comparison, from its numbers. A reduction is good everywhere, and what is worse is marked."""

from collections.abc import Mapping, Sequence

from ..runtime.markdown import code
from ..statistics import Estimate
from .document import Cell, Document
from .summary import cost_of_training
from .verdict import verdict, without_equal_compute

# In a cell: what was asked for and could not be measured, and what was not asked for.
MISSING = "missing"
NOT_ASKED = "-"

# arXiv 2605.02105, OLMo-2-1B: how much less SAM loses than AdamW, in per cent.
PAPER = {"forgetting after fine-tuning": 31, "damage of 4 bits": 40}


def summary_document(summary: dict) -> Document:
    """The summary as a short report."""
    document = Document("What was lost, and where it ended")
    add_verdict(document, summary)
    add_tables(document, summary)
    return document


def verdict_document(summary: dict) -> Document:
    """The verdict in words, and one line for each run."""
    document = Document("What was lost, and where it ended")
    add_verdict(document, summary)
    return document


def add_verdict(document: Document, summary: dict) -> None:
    """Add the verdict in words, and one line for each run."""
    document.points(verdict(summary))
    document.text(
        f"Losses are in nats per token on {code(summary['data'])}; reductions are against "
        f"{code(summary['reference'])}, in brackets the 95% interval. ✓ is better than the reference and ✗ worse, "
        "where the interval excludes equality. "
        f"(The paper, arXiv 2605.02105, has {PAPER['forgetting after fine-tuning']}% less forgetting and "
        f"{PAPER['damage of 4 bits']}% less damage of 4 bits for SAM against AdamW on OLMo-2-1B.)"
    )
    header, rows = overview(summary)
    document.heading("All runs")
    document.table(header, rows)


def overview(summary: dict) -> tuple[list[str], list[list[str | Cell]]]:
    """One line for each run, sorted by where it ended: fine-tuned if it was, else in the first scheme, else as it is.

    The first is the best; the reference is among them.
    """
    schemes = list(summary["runs"][summary["reference"]]["quantized"])
    fine_tuned = any(run["fine-tuned"] for run in summary["runs"].values())
    trained = any(_took(run) for run in summary["runs"].values())
    header = ["run", *(["cost of training"] if trained else []), "base loss"]
    header += ["forgets less", "ends lower after fine-tuning"] if fine_tuned else []
    for scheme in schemes:
        header += [f"loses less to {scheme}", f"loss in {scheme}"]
    rows = []
    for name, run in summary["runs"].items():
        is_reference = name == summary["reference"]
        row: list[str | Cell] = [name, *([_cost(name, summary)] if trained else [])]
        row.append(marked(_number(run["base loss"]), run["base difference"], less_is_better=True))
        end = run["base difference"]
        if fine_tuned:
            found = run["fine-tuned"] or {}
            end = found.get("loss difference")
            absent = "reference" if is_reference else MISSING if run["has tuned models"] else NOT_ASKED
            nothing = f"{summary['reference']} forgot nothing" if end is not None else absent
            row.append(estimate(found.get("reduction"), ".1f", "%", absent=nothing, less_is_better=False))
            row.append(estimate(end and negative(end), "+.4f", absent=absent, less_is_better=False))
        for scheme in schemes:
            found = run["quantized"][scheme]
            absent = _absent(found, summary["reference"], is_reference)
            row.append(estimate(found["reduction"], ".1f", "%", absent=absent, less_is_better=False))
            row.append(marked(_number(found["loss"]), found["loss difference"], less_is_better=True))
        if not fine_tuned and schemes:
            end = run["quantized"][schemes[0]]["loss difference"]
        rows.append((_order(end, is_reference), row))
    return header, [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _absent(found: dict, reference: str, is_reference: bool) -> str:
    """What the cell of a reduction of damage says where there is none."""
    if is_reference:
        return "reference"
    return f"{reference} lost nothing" if found["loss difference"] is not None else MISSING


def _order(end: dict | None, is_reference: bool) -> tuple[bool, float]:
    if end is None or end["value"] is None:
        return not is_reference, 0.0
    return False, end["value"]


def add_tables(document: Document, summary: dict) -> None:
    """Add the tables of a summary to a report."""
    _add_training(document, summary)
    _add_quantized(document, summary)
    found = {name: run["fine-tuned"] for name, run in summary["runs"].items()}
    found |= {f"{name}, Wise-FT": run["wise-ft"] for name, run in summary["runs"].items()}
    along = (
        "Means over the range of task losses that both sweeps span, along curves through the runs on the frontier of "
        "each sweep."
    )
    if any(run["wise-ft"] for run in summary["runs"].values()):
        along += " Those of Wise-FT lie between the base and its tuned model with the lowest task loss."
    _add_fine_tuned(document, "Fine-tuned, at equal task loss", found, summary["reference"], along)
    for scheme in summary["runs"][summary["reference"]]["quantized"]:
        found = {name: run["fine-tuned and quantized"][scheme] for name, run in summary["runs"].items()}
        title = f"Fine-tuned and quantized to {scheme}, at equal task loss"
        what = f"The same for the tuned models in {code(scheme)}, on both data, against the base in full precision."
        _add_fine_tuned(document, title, found, summary["reference"], what)
    _add_benchmarks(document, summary)


def _took(run: dict) -> dict:
    took = run["training"] or {}
    return took if "passes" in took else {}


def _cost(name: str, summary: dict) -> str:
    cost = cost_of_training(summary, name)
    return NOT_ASKED if cost is None else f"{cost:.2f}x"


def _add_training(document: Document, summary: dict) -> None:
    rows = [
        [name, str(took["own_steps"]), str(took["sam_steps"]), f"{took['passes']:.2f}"]
        for name, run in summary["runs"].items()
        if (took := _took(run))
    ]
    if rows:
        document.heading("What the training of the base models took")
        document.table(["run", "steps", "of these with SAM", "passes over each batch"], rows)
        if lacking := without_equal_compute(summary):
            names = ", ".join(map(code, lacking))
            document.text(
                f"No run without SAM has the compute of {names}: whether more plain training would do as well is open."
            )


def _add_quantized(document: Document, summary: dict) -> None:
    for scheme in summary["runs"][summary["reference"]]["quantized"]:
        rows, problems, counts = [], [], []
        for name, run in summary["runs"].items():
            found = run["quantized"][scheme]
            is_reference = name == summary["reference"]
            counts += [] if is_reference else [found["reduction seeds"]]
            absent = _absent(found, summary["reference"], is_reference)
            reduction = estimate(found["reduction"], ".1f", "%", problems, absent=absent, less_is_better=False)
            damage = estimate(found["damage"], ".4f", problems=problems)
            ended = marked(_number(found["loss"]), found["loss difference"], less_is_better=True)
            rows.append([name, _number(run["base loss"]), damage, reduction, ended])
        document.heading(f"Quantized to {scheme}")
        own = [max(1, len(run["seeds"])) for run in summary["runs"].values()]
        damage, reduction = f"damage [95%, {_seeds(own)}]", f"reduction [95%, {_seeds(counts or own)}]"
        document.table(["run", "base loss", damage, reduction, "loss where it ended"], rows)
        _add_notes(document, _about_seeds(counts or own), problems)
    for scheme, runs in summary["not shared"].items():
        document.text(f"Not compared: {code(scheme)}, which only {', '.join(map(code, runs))} was quantized to.")


def _add_fine_tuned(
    document: Document, title: str, runs: Mapping[str, dict | None], reference: str, explanation: str
) -> None:
    runs = {name: found for name, found in runs.items() if found is not None}
    if not runs:
        return
    document.heading(title)
    rows, problems = [], []
    for name, found in runs.items():
        if "missing" in found:
            against = f"{code(name)} against {code(reference)}"
            document.text(f"{against} at equal task loss: missing. {found['missing']}")
            continue
        problems += found["warnings"]
        rows.append(
            [
                name,
                "{:.2f} to {:.2f}".format(*found["task losses"]),
                f"{found['of the reference']:.4f} -> {found['forgetting']:.4f}",
                estimate(
                    found["reduction"],
                    ".1f",
                    "%",
                    problems,
                    absent=f"{reference} forgot nothing",
                    less_is_better=False,
                ),
                f"{found['loss of the reference']:.4f} -> {found['loss']:.4f}",
                estimate(found["loss difference"], "+.4f", problems=problems, less_is_better=True),
            ]
        )
    if rows:
        document.text(explanation)
        counts = [found["seeds"] for found in runs.values() if "missing" not in found]
        reduction = f"reduction [95%, {_seeds(counts)}]"
        header = [
            "run",
            "task losses",
            "forgetting, reference -> run",
            reduction,
            "loss where they ended",
            "difference",
        ]
        document.table(header, rows)
        _add_notes(document, _about_seeds(counts), [one for one in problems if not one.startswith("One training seed")])


def _add_benchmarks(document: Document, summary: dict) -> None:
    rows = []
    for name, run in summary["runs"].items():
        base = next((found["mean"] for found in run["benchmarks"] if found["kind"] == "base"), None)
        for found in run["benchmarks"]:
            change = f"{found['mean'] - base:+.1f}" if found["kind"] != "base" and base is not None else ""
            rows.append([name, found["model"], f"{found['mean']:.1f} ± {found['standard error']:.1f}", change])
    if not rows:
        return
    document.heading("Benchmarks, mean accuracy in per cent")
    document.text("± is the standard error over examples.")
    document.table(["run", "model", "accuracy", "change"], rows)
    rows, problems, counts = [], [], []
    for name, run in summary["runs"].items():
        found = run["benchmarks at equal task loss"]
        if found is None:
            continue
        if "missing" in found:
            document.text(f"{code(name)} at equal task loss: missing. {found['missing']}")
            continue
        counts.append(found["seeds"])
        difference = estimate(found["difference"], "+.1f", problems=problems, less_is_better=False)
        span = "{:.2f} to {:.2f}".format(*found["task losses"])
        rows.append([name, span, f"{found['of the reference']:.1f} -> {found['mean']:.1f}", difference])
    if rows:
        document.text("Of the fine-tuned models at equal task loss, over the range that both sweeps span:")
        difference = f"difference [95%, {_seeds(counts)}]"
        document.table(["run", "task losses", "accuracy, reference -> run", difference], rows)
        _add_notes(document, _about_seeds(counts), problems)


def estimate(
    values: Mapping | None,
    form: str,
    unit: str = "",
    problems: list[str] | None = None,
    *,
    absent: str = MISSING,
    less_is_better: bool | None = None,
) -> Cell:
    """An estimate as a cell of a table.

    Args:
        values (`Mapping` or `None`): the estimate as a dictionary.
        form, unit (`str`): of its text.
        problems (`list[str]`, *optional*): why it has no interval is added to them.
        absent (`str`): what the cell says without an estimate.
        less_is_better (`bool`, *optional*): marks the cell by the sign of the estimate, if its interval excludes 0.
    """
    if values is None:
        return Cell(absent)
    found = Estimate.from_dict(values)
    if found.problem and problems is not None:
        problems.append(f"No interval: {found.problem}")
    text = found.text(form, unit=unit)
    return Cell(text) if less_is_better is None else marked(text, values, less_is_better=less_is_better)


def marked(text: str, difference: Mapping | None, *, less_is_better: bool) -> Cell:
    """A cell that is marked as better or worse if the interval of the difference from the reference excludes 0."""
    if difference is None or difference["low"] is None:
        return Cell(text)
    if difference["low"] > 0:
        return Cell(text, "worse" if less_is_better else "better")
    if difference["high"] < 0:
        return Cell(text, "better" if less_is_better else "worse")
    return Cell(text)


def negative(values: Mapping) -> dict:
    """An estimate of the opposite sign."""
    ends = {"value": values["value"], "low": values["high"], "high": values["low"]}
    return {**values, **{name: None if value is None else -value for name, value in ends.items()}}


def _seeds(counts: Sequence[int]) -> str:
    """How many seeds the numbers of a column are means of."""
    few, many = min(counts), max(counts)
    return f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"


def _about_seeds(counts: Sequence[int]) -> str:
    if max(counts) == 1:
        return "One training seed: intervals are over documents and do not include the variation between seeds."
    return (
        "Intervals are over documents and training seeds; those of two runs with the same seed are paired, and seeds "
        "that one of them lacks are left out of the reduction."
    )


def _add_notes(document: Document, note: str, problems: Sequence[str]) -> None:
    sentences = [problem[0].upper() + problem[1:].rstrip(".") + "." for problem in dict.fromkeys(problems)]
    document.text(" ".join([note, *sentences]))


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"
