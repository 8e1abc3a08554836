"""The comparison of the runs of an experiment, as in the paper: damage of few bits, forgetting at equal task loss."""

from ..evaluation import Results
from ..report.document import Document
from ..runtime.run_record import read_finished
from ..statistics import forgetting, forgetting_reduction

# arXiv 2605.02105, OLMo-2-1B: how much less SAM forgets than AdamW, in per cent.
PAPER = {"forgetting after fine-tuning": 31, "damage of 4 bits": 40}


def summarize(results: list[Results]) -> dict:
    """The table of the paper: what each run lost, and how much less than the first.

    Args:
        results (`list[Results]`): the first is the reference.

    Returns:
        `dict`: for each run its losses, damage and forgetting, with the reductions against the reference in per cent;
        None for what could not be measured.
    """
    reference, *_ = results
    data = reference.old[0]
    environment = {name: value for name, value in reference.record["environment"].items() if name != "command"}
    summary = {"reference": reference.name, "data": data, "environment": environment, "runs": {}}
    schemes = reference.record["settings"]["quantize"]
    lost = {scheme: _damage(reference, data, scheme) for scheme in schemes}
    for one in results:
        before = one.loss(one.base, data)
        row = {"base loss": None if before is None else before.loss, "quantized": {}, "fine-tuned": None}
        # What was really done, not what was asked for; not known of a model that was trained elsewhere.
        row["training"] = read_finished(one.record["models"][0]["spec"])
        for scheme in schemes:
            own, after = _damage(one, data, scheme), one.loss(one.base, data, scheme)
            known = own is not None and lost[scheme] is not None and lost[scheme] > 0
            row["quantized"][scheme] = {
                "damage": own,
                "loss": None if after is None else after.loss,
                "reduction": 100 * (1 - own / lost[scheme]) if known else None,
            }
        row["sweep"] = [
            {"model": run.name, "task loss": run.task.loss, "forgetting": run.forgetting, "loss": run.after.loss}
            for run in one.sweep()
        ]
        if one is not reference and row["sweep"]:
            try:
                found = forgetting_reduction(reference.sweep(), one.sweep())
                row["fine-tuned"] = {
                    "task loss": found.task_loss,
                    "forgetting": found.method,
                    "of the reference": found.reference,
                    "reduction": 100 * found.relative.value,
                    "interval": [100 * found.relative.low, 100 * found.relative.high],
                    "loss": found.end_method,
                    "loss of the reference": found.end_reference,
                }
            except ValueError as error:
                row["fine-tuned"] = {"missing": str(error)}
        row["benchmarks"] = _benchmarks(one, schemes)
        summary["runs"][one.name] = row
    return summary


def _benchmarks(one: Results, schemes: list[str]) -> dict:
    """Mean accuracy over the tasks, in per cent, of the base, quantized, and of each tuned model."""

    def mean(model, variant=""):
        scores = one.benchmarks(model, variant)
        return 100 * sum(score.value for score in scores.values()) / len(scores) if scores else None

    found = {"base": mean(one.base)}
    if found["base"] is None:
        return {}
    return found | {scheme: mean(one.base, scheme) for scheme in schemes} | {name: mean(name) for name in one.tuned}


def _damage(one: Results, data: str, scheme: str) -> float | None:
    before, after = one.loss(one.base, data), one.loss(one.base, data, scheme)
    return None if before is None or after is None else forgetting(before, after).value


def summary_document(summary: dict) -> Document:
    """The summary as tables, with the paper's figures."""
    document = Document("What was lost, and where it ended")
    reference = summary["reference"]
    document.text(
        f"Nats per token on `{summary['data']}`; reductions are against `{reference}`, more is better. The paper "
        f"(arXiv 2605.02105, OLMo-2-1B, SAM against AdamW) has {PAPER['forgetting after fine-tuning']}% less "
        f"forgetting after MetaMath and {PAPER['damage of 4 bits']}% less damage of 4 bits."
    )
    trained = [
        (name, run.get("training")) for name, run in summary["runs"].items() if "passes" in (run.get("training") or {})
    ]
    if trained:
        document.heading("What the training of the base models took")
        document.table(
            ["run", "steps", "of these with SAM", "passes over each batch"],
            [[name, str(t["own_steps"]), str(t["sam_steps"]), f"{t['passes']:.2f}"] for name, t in trained],
        )
    for scheme in summary["runs"][reference]["quantized"]:
        rows = []
        for name, run in summary["runs"].items():
            found = run["quantized"][scheme]
            change = "reference" if name == reference else _percent(found["reduction"])
            rows.append([name, _number(run["base loss"]), _number(found["damage"]), change, _number(found["loss"])])
        document.heading(f"Quantized to {scheme}")
        document.table(["run", "base loss", "damage", "reduction", "loss where it ended"], rows)
    rows = []
    for name, run in summary["runs"].items():
        found = run["fine-tuned"]
        if found is None:
            continue
        if "missing" in found:
            document.text(f"`{name}` at equal task loss: missing. {found['missing']}")
            continue
        low, high = found["interval"]
        rows.append(
            [
                name,
                f"{found['task loss']:.4f}",
                f"{found['of the reference']:.4f} -> {found['forgetting']:.4f}",
                f"{found['reduction']:.1f}% [{low:.1f}, {high:.1f}]",
                f"{found['loss of the reference']:.4f} -> {found['loss']:.4f}",
            ]
        )
    if rows:
        document.heading("Fine-tuned, at equal task loss")
        header = ["run", "task loss", "forgetting, reference -> run", "reduction [95%]", "loss where they ended"]
        document.table(header, rows)
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
    return document


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "missing" if value is None else f"{value:.0f}%"
