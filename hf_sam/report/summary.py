"""The numbers of a comparison, and the tables that show them: damage of few bits, forgetting at equal task loss."""

from collections.abc import Mapping, Sequence

from ..evaluation.results import Results
from ..statistics import forgetting, forgetting_reduction
from .document import Document

MISSING = "missing"

# arXiv 2605.02105, OLMo-2-1B: how much less SAM loses than AdamW, in per cent.
PAPER = {"forgetting after fine-tuning": 31, "damage of 4 bits": 40}


def summarize(results: Sequence[Results], training: Mapping[str, dict] | None = None) -> dict:
    """What each run lost, and how much less than the first run.

    Args:
        results (`Sequence[Results]`): the runs; the first is the reference.
        training (`Mapping[str, dict]`, *optional*): what the training of base models took, by run: `own_steps`,
            `sam_steps` and `passes`.

    Returns:
        `dict`: for JSON. For each run its losses in nats per token, damage and forgetting, with reductions against the
        reference in per cent (positive: lost less); None for what could not be measured.
    """
    reference, *_ = results
    data = reference.old[0]
    environment = {name: value for name, value in reference.record["environment"].items() if name != "command"}
    summary = {"reference": reference.name, "data": data, "environment": environment, "runs": {}}
    # Those that all runs were quantized to.
    schemes = [s for s in reference.schemes if all(s in one.schemes for one in results)]
    lost = {scheme: _damage(reference, data, scheme) for scheme in schemes}
    for one in results:
        before = one.loss(one.base, data)
        summary["runs"][one.name] = {
            "base loss": None if before is None else before.loss,
            "training": (training or {}).get(one.name),
            "quantized": {scheme: _quantized(one, data, scheme, lost[scheme]) for scheme in schemes},
            "fine-tuned": _fine_tuned(reference, one) if one is not reference else None,
            "sweep": [
                {"model": run.name, "task loss": run.task.loss, "forgetting": run.forgetting, "loss": run.after.loss}
                for run in one.sweep()
            ],
            "benchmarks": _benchmark_means(one, schemes),
        }
    return summary


def _damage(one: Results, data: str, scheme: str):
    before, after = one.loss(one.base, data), one.loss(one.base, data, scheme)
    return None if before is None or after is None else forgetting(before, after)


def _quantized(one: Results, data: str, scheme: str, reference) -> dict:
    own, after = _damage(one, data, scheme), one.loss(one.base, data, scheme)
    known = own is not None and reference is not None and reference.value > 0
    return {
        "damage": None if own is None else own.value,
        "interval": None if own is None else [own.low, own.high],
        "loss": None if after is None else after.loss,
        "reduction": 100 * (1 - own.value / reference.value) if known else None,
    }


def _fine_tuned(reference: Results, one: Results) -> dict | None:
    if not one.sweep():
        return None
    try:
        found = forgetting_reduction(reference.sweep(), one.sweep())
    except ValueError as error:
        return {"missing": str(error)}
    return {
        "task loss": found.task_loss,
        "forgetting": found.method,
        "of the reference": found.reference,
        "reduction": 100 * found.relative.value,
        "interval": [100 * found.relative.low, 100 * found.relative.high],
        "resamples": found.used,
        "loss": found.end_method,
        "loss of the reference": found.end_reference,
    }


def _benchmark_means(one: Results, schemes: Sequence[str]) -> dict:
    """Mean accuracy over the tasks, in per cent, of the base, quantized, and of each tuned model."""

    def mean(model, variant=""):
        scores = one.benchmarks(model, variant)
        return 100 * sum(score.value for score in scores.values()) / len(scores) if scores else None

    found = {"base": mean(one.base)}
    if found["base"] is None:
        return {}
    return found | {scheme: mean(one.base, scheme) for scheme in schemes} | {name: mean(name) for name in one.tuned}


def summary_document(summary: dict) -> Document:
    """The summary as a short report."""
    document = Document("What was lost, and where it ended")
    document.text(
        f"Nats per token on `{summary['data']}`; reductions are against `{summary['reference']}`, more is better. The "
        f"paper (arXiv 2605.02105, OLMo-2-1B, SAM against AdamW) has {PAPER['forgetting after fine-tuning']}% less "
        f"forgetting after MetaMath and {PAPER['damage of 4 bits']}% less damage of 4 bits."
    )
    add_summary(document, summary)
    return document


def add_summary(document: Document, summary: dict) -> None:
    """Add the tables of a summary to a report."""
    _add_training(document, summary)
    _add_quantized(document, summary)
    _add_fine_tuned(document, summary)
    _add_benchmark_means(document, summary)


def _add_training(document: Document, summary: dict) -> None:
    rows = [
        [name, str(took["own_steps"]), str(took["sam_steps"]), f"{took['passes']:.2f}"]
        for name, run in summary["runs"].items()
        if "passes" in (took := run["training"] or {})
    ]
    if rows:
        document.heading("What the training of the base models took")
        document.table(["run", "steps", "of these with SAM", "passes over each batch"], rows)


def _add_quantized(document: Document, summary: dict) -> None:
    for scheme in summary["runs"][summary["reference"]]["quantized"]:
        rows = []
        for name, run in summary["runs"].items():
            found = run["quantized"][scheme]
            interval = "" if found["damage"] is None else " [{:.4f}, {:.4f}]".format(*found["interval"])
            reduction = "reference" if name == summary["reference"] else _reduction(found, summary, scheme)
            cells = [_number(run["base loss"]), _number(found["damage"]) + interval, reduction, _number(found["loss"])]
            rows.append([name, *cells])
        document.heading(f"Quantized to {scheme}")
        document.table(["run", "base loss", "damage [95%]", "reduction", "loss where it ended"], rows)


def _reduction(found: dict, summary: dict, scheme: str) -> str:
    lost = summary["runs"][summary["reference"]]["quantized"][scheme]["damage"]
    if found["damage"] is not None and lost is not None and lost <= 0:
        return "reference lost nothing"
    return MISSING if found["reduction"] is None else f"{found['reduction']:.0f}%"


def _add_fine_tuned(document: Document, summary: dict) -> None:
    runs = {name: run["fine-tuned"] for name, run in summary["runs"].items() if run["fine-tuned"] is not None}
    if not runs:
        return
    document.heading("Fine-tuned, at equal task loss")
    rows = []
    for name, found in runs.items():
        if "missing" in found:
            document.text(f"`{name}` against `{summary['reference']}` at equal task loss: missing. {found['missing']}")
            continue
        low, high = found["interval"]
        rows.append(
            [
                name,
                f"{found['task loss']:.4f}",
                f"{found['of the reference']:.4f} -> {found['forgetting']:.4f}",
                f"{found['reduction']:.1f}% [{low:.1f}, {high:.1f}]",
                f"{found['loss of the reference']:.4f} -> {found['loss']:.4f}",
                f"{100 * found['resamples']:.0f}%",
            ]
        )
    if rows:
        document.text(
            "Interpolated along the frontier of each sweep, with the 95% interval over documents. It does not "
            "include the variation between training seeds. It is taken over the resamples in which both sweeps span "
            "that task loss; if these are few, it says little."
        )
        header = ["run", "task loss", "forgetting, reference -> run", "reduction [95%]", "loss where they ended"]
        document.table([*header, "resamples"], rows)


def _add_benchmark_means(document: Document, summary: dict) -> None:
    scores = {name: run["benchmarks"] for name, run in summary["runs"].items() if run["benchmarks"]}
    if scores:
        document.heading("Benchmarks, mean accuracy in per cent")
        document.table(
            ["run", "model", "accuracy", "change"],
            [
                [name, model, f"{value:.1f}", f"{value - found['base']:+.1f}"]
                for name, found in scores.items()
                for model, value in found.items()
                if value is not None
            ],
        )


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"
