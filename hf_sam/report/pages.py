"""The report of one evaluation. Everything comes from `results.json`.

Comparisons show both what was lost and the final loss, because a model that loses less may still end worse.
"""

from collections.abc import Mapping
from pathlib import Path

from ..evaluation.results import Results
from ..instruments import BenchmarkResult, Instrument, score_change
from ..instruments.registry import group_title, groups
from ..runtime.markdown import code
from ..statistics.losses import HeldOutLoss, forgetting
from .document import Cell, Document
from .tables import MISSING, marked
from .verdict import verdict_of_evaluation

# Quantized embeddings differ by a few per cent, those of another model by as much as they are large.
_OTHER_EMBEDDINGS = 0.3


def write_report(record: dict, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.md`, its pictures and the self-contained `report.html` of one evaluation.

    Returns:
        `tuple[Path, Path]`: the paths of the two reports.
    """
    return evaluation_report(Results(record)).write(folder)


def evaluation_report(results: Results) -> Document:
    """The report of one evaluation."""
    document = short_report(results)
    setup(document, results)
    losses(document, results)
    interpolations(document, results)
    quantization(document, results)
    benchmarks(document, results)
    instruments(document, results)
    failures(document, results)
    return document


def short_report(results: Results) -> Document:
    """What was lost, in words."""
    document = Document(f"Evaluation: {results.name}")
    document.points(verdict_of_evaluation(results))
    return document


def setup(document: Document, results: Results) -> None:
    """Models, data, versions and hardware."""
    document.heading("Setup")
    environment = dict(results.record["environment"])
    command = " ".join(environment.pop("command"))
    document.text(f"{results.record['created']}, by {code(command)}.")
    document.table(
        ["model", "source", "weights (hash)"],
        [[m["name"], m["spec"], m["fingerprint"]] for m in results.record["models"]],
    )
    document.table(
        ["data", "role", "documents", "tokens", "hash"],
        [
            [d["name"], d["role"], str(d["documents"]), str(d["tokens"]), d["fingerprint"]]
            for d in results.record["data"]
        ],
    )
    document.text("; ".join(f"{name} {_short(value)}" for name, value in environment.items()) + ".")


def losses(document: Document, results: Results) -> None:
    """Held-out losses and forgetting."""
    document.heading("Held-out loss and forgetting")
    if results.tuned:
        document.text(
            "Nats per token: the sum of the losses of all tokens over their number. Forgetting is the loss on old data "
            "after minus before; in brackets the 95% interval over documents."
        )
    rows = []
    for data in (*results.old, *results.tasks):
        role = "old" if data in results.old else "task"
        before = results.loss(results.base, data)
        for name in results.models:
            if not results.readable(name, data):
                rows.append([data, role, name, "cannot read its tokens", "", ""])
                continue
            loss = results.loss(name, data)
            values = [MISSING, MISSING] if loss is None else [f"{loss.loss:.4f}", f"{loss.perplexity:.2f}"]
            change = "" if name == results.base or before is None else change_text(before, loss)
            rows.append([data, role, name, *values, change])
    document.table(["data", "role", "model", "loss", "perplexity", "change"], rows)


def interpolations(document: Document, results: Results) -> None:
    """Wise-FT."""
    alphas = results.record["settings"]["wise_ft"]
    if not alphas or not results.tuned:
        return
    document.heading("Wise-FT: interpolation between base and tuned model")
    document.text("Loss, and in brackets its change against the base with the 95% interval.")
    sets = (*results.old, *results.tasks)
    rows = []
    for name in results.tuned:
        for alpha in alphas:
            row = [name, f"{alpha:g}"]
            for data in sets:
                loss = results.loss(name, data, f"wise-ft {alpha:g}")
                change = change_text(results.loss(results.base, data), loss)
                row.append(MISSING if loss is None else f"{loss.loss:.4f} ({change})")
            rows.append(row)
    document.table(["model", "alpha", *(f"loss on {data}" for data in sets)], rows)


def quantization(document: Document, results: Results) -> None:
    """Damage of quantization."""
    schemes = dict.fromkeys(scheme for name in results.models for scheme in results.schemes(name))
    if not schemes:
        return
    document.heading("Quantization")
    document.text(
        "Damage is the loss after quantization minus before. Bits are per quantized weight, scales included; "
        "embeddings and output layer stay in full precision, except in GGUF files. `rtn` is simulated rounding in "
        "groups of 128."
    )
    rows = []
    for scheme in schemes:
        for name in results.models:
            if scheme not in results.schemes(name):
                continue
            (proof,) = results.find("quantized", name, scheme)
            held = [MISSING, MISSING] if proof["result"] is None else _held(proof["result"])
            for data in results.old:
                before, after = results.loss(name, data), results.loss(name, data, scheme)
                row = [loss_text(before), loss_text(after), change_text(before, after)]
                rows.append([scheme, *held, name, data, *row])
    document.table(["scheme", "bits", "held as", "model", "data", "before", "after", "damage"], rows)
    for one in results.record["quantized"]:
        document.text(
            f"{code(one['scheme'])} of {code(one['model'])} was quantized elsewhere: {code(one['spec'])}, weights "
            f"{one['fingerprint']}.{_doubt(results, one)}"
        )


def benchmarks(document: Document, results: Results) -> None:
    """Scores, and their changes by fine-tuning and by quantization."""
    scores = [results.benchmarks(name) for name in results.models]
    before, tasks = scores[0], next(filter(None, scores), {})
    if not tasks:
        return
    document.heading("Benchmarks")
    document.text(
        "Scores of lm-evaluation-harness (shares in per cent) with their standard errors over examples. The change is "
        "that against the base, or of a quantized model against the same one in full precision, with its 95% interval "
        "over the examples, which are paired."
    )
    variants = [(results.base, "", None)]
    variants += [(name, "", before) for name in results.tuned]
    for alpha in results.record["settings"]["wise_ft"]:
        variants += [(name, f"wise-ft {alpha:g}", before) for name in results.tuned]
    for name in results.models:
        variants += [(name, scheme, results.benchmarks(name)) for scheme in results.schemes(name)]
    rows = []
    for task in tasks:
        for name, variant, reference in variants:
            result = results.benchmarks(name, variant).get(task)
            about = [task, tasks[task].metric, "more" if tasks[task].higher_is_better else "less"]
            about.append(f"{name} {variant}".strip())
            change = _score_change(reference, result) if reference and result is not None else Cell("")
            rows.append([*about, MISSING if result is None else result.text(), change])
    document.table(["task", "metric", "better", "model", "score", "change"], rows)


def instruments(document: Document, results: Results) -> None:
    """A section for each group of instruments: notes, one table with a row for each model, pictures, more tables."""
    for group, known in groups().items():
        chosen = [instrument for instrument in known if instrument.name in results.selected(group)]
        if not chosen:
            continue
        document.heading(group_title(group))
        with_columns = [instrument for instrument in chosen if instrument.columns]
        notes = [instrument.note for instrument in with_columns if instrument.note]
        used = {s.name: results.record["settings"][s.name] for instrument in chosen for s in instrument.settings}
        notes += [f"Settings: {', '.join(f'`{name}` {value}' for name, value in used.items())}."] if used else []
        if notes:
            document.text(" ".join(notes))
        found = {instrument.name: results.by_model(instrument.name) for instrument in chosen}
        models = dict.fromkeys(model for instrument in with_columns for model in found[instrument.name])
        document.table(
            ["model", *(column.title for instrument in with_columns for column in instrument.columns)],
            [[model, *_cells(with_columns, found, model)] for model in models],
        )
        for instrument in chosen:
            if present := _present(found[instrument.name]):
                for plot in instrument.plots(present):
                    document.figure(plot.name, plot.png, plot.caption)
                for header, rows in instrument.tables(present):
                    document.table(header, rows)


def _cells(chosen: list[Instrument], found: dict[str, dict], model: str) -> list[str]:
    cells = []
    for instrument in chosen:
        result = found[instrument.name].get(model, "")  # "": not measured on models of this kind
        for column in instrument.columns:
            cells.append(MISSING if result is None else result and column.cell(result))
    return cells


def _doubt(results: Results, made: dict) -> str:
    """A warning if a model that somebody else quantized was made from another one than it is compared with."""
    found = results.find("quantized", made["model"], made["scheme"])
    difference = (found[0]["result"] or {}).get("embedding_difference") if found else None
    if difference is None or difference < _OTHER_EMBEDDINGS:
        return ""
    return (
        f" Its embeddings differ from those of {code(made['model'])} by {difference:.0%}: it was made from another "
        "model, or by a method that rotates them. **Check this before you use its damage.**"
    )


def _held(proof: dict) -> list[str]:
    """Bits, and what holds the weights, for a table."""
    left = f", {proof['left'] / (proof['left'] + proof['weights']):.0%} left in full precision" if proof["left"] else ""
    return [f"{proof['bits']:.2f}", f"{', '.join(proof['kinds'])} ({proof['layers']}){left}"]


def failures(document: Document, results: Results) -> None:
    """Parts that failed."""
    failed = [record for record in results.record["parts"] if record.get("error")]
    if failed:
        document.heading("Missing")
        columns = ("part", "model", "variant", "data", "error")
        rows = [[record.get(column, "") for column in columns] for record in failed]
        document.table(["measure", "model", "variant", "data", "why"], rows)


def loss_text(loss: HeldOutLoss | None) -> str:
    """A loss for a table."""
    return MISSING if loss is None else f"{loss.loss:.4f}"


def change_text(before: HeldOutLoss | None, after: HeldOutLoss | None) -> Cell:
    """The growth of a loss with its interval, for a table."""
    if before is None or after is None:
        return Cell(MISSING)
    change = forgetting(before, after)
    return marked(str(change), change.to_dict(), less_is_better=True)


def _present(found: dict) -> dict:
    return {name: value for name, value in found.items() if value is not None}


def _short(value) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _score_change(reference: Mapping[str, BenchmarkResult], result: BenchmarkResult) -> Cell:
    """The change of a score, if the reference has one."""
    before = reference.get(result.task)
    if before is None:
        return Cell(MISSING)
    change = score_change(before, result)
    text = change.text("+.1f", scale=100) if result.in_per_cent else change.text("+.3g")
    return marked(text, change.to_dict(), less_is_better=not result.higher_is_better)
