"""The numbers of a comparison, and the tables that show them: damage of few bits, forgetting at equal task loss."""

from collections.abc import Sequence
from statistics import fmean

from ..evaluation.results import Results
from ..statistics import Estimate, damage_reduction, forgetting_reduction, mean_forgetting
from .document import Document
from .methods import SEED_PATTERN, Method, group_by_seed, pair

# In a cell: what was asked for and could not be measured, and what was not asked for.
MISSING = "missing"
NOT_ASKED = "-"

# arXiv 2605.02105, OLMo-2-1B: how much less SAM loses than AdamW, in per cent.
PAPER = {"forgetting after fine-tuning": 31, "damage of 4 bits": 40}


def summarize(results: Sequence[Results], pattern: str = SEED_PATTERN) -> dict:
    """What each method lost, and how much less than the first one.

    Args:
        results (`Sequence[Results]`): the evaluations, grouped over training seeds by their names; the method of the
            first is the reference.
        pattern (`str`): see [`group_by_seed`].

    Returns:
        `dict`: for JSON. For each method its losses in nats per token, damage and forgetting, means over the seeds with
        their 95% intervals, and reductions against the reference in per cent (positive: lost less); None for what could
        not be measured.
    """
    methods = group_by_seed(results, pattern)
    reference, first = methods[0], results[0]
    data = first.old[0]
    environment = {name: value for name, value in first.record["environment"].items() if name != "command"}
    summary = {"reference": reference.name, "data": data, "environment": environment, "runs": {}}
    # Those that all models were quantized to.
    schemes = [scheme for scheme in first.schemes() if all(scheme in one.schemes() for one in results)]
    for method in methods:
        summary["runs"][method.name] = {
            "seeds": [seed for seed in method.by_seed if seed is not None],
            "base loss": _mean_loss(method, data),
            "training": method.results[0].training,
            "quantized": {scheme: _quantized(reference, method, data, scheme) for scheme in schemes},
            "fine-tuned": _fine_tuned(reference, method) if method is not reference else None,
            "sweep": [_point(one, run) for one in method.results for run in one.sweep()],
            "benchmarks": _benchmark_means(method, schemes),
        }
    return summary


def _point(one: Results, run) -> dict:
    return {
        "evaluation": one.name,
        "model": run.name,
        "task loss": run.task.loss,
        "forgetting": run.forgetting,
        "loss": run.after.loss,
    }


def _mean_loss(method: Method, data: str, scheme: str = "") -> float | None:
    losses = [one.loss(one.base, data, scheme) for one in method.results]
    return None if None in losses else fmean(loss.loss for loss in losses)


def _losses(results: Sequence[Results], data: str, scheme: str) -> list[tuple] | None:
    """Losses of the bases before and after, by seed; None if one is missing."""
    pairs = [(one.loss(one.base, data), one.loss(one.base, data, scheme)) for one in results]
    return None if any(None in losses for losses in pairs) else pairs


def _quantized(reference: Method, method: Method, data: str, scheme: str) -> dict:
    own = _losses(method.results, data, scheme)
    damage = None if own is None else mean_forgetting(own)
    pairs = pair(reference, method)
    both = [_losses([one[which] for one in pairs], data, scheme) for which in (0, 1)]
    reduction = None
    if None not in both and method is not reference and mean_forgetting(both[0]).value > 0:
        reduction = damage_reduction(*both).scaled(100).to_dict()
    return {
        "damage": None if damage is None else damage.to_dict(),
        "loss": _mean_loss(method, data, scheme),
        "reduction": reduction,
        "reduction seeds": len(pairs),
    }


def _fine_tuned(reference: Method, method: Method) -> dict | None:
    sweeps = [[one.sweep() for one in side] for side in zip(*pair(reference, method), strict=True)]
    if not any(sweeps[1]):
        return None
    try:
        found = forgetting_reduction(*sweeps)
    except ValueError as error:
        return {"missing": str(error)}
    return {
        "task losses": [found.low, found.high],
        "forgetting": found.method,
        "of the reference": found.reference,
        "reduction": found.relative.scaled(100).to_dict(),
        "seeds": found.seeds,
        "loss": found.end_method,
        "loss of the reference": found.end_reference,
        "warnings": found.warnings,
        "curve": found.curve.to_dict(),
    }


def _benchmark_means(method: Method, schemes: Sequence[str]) -> dict:
    """Mean accuracy over tasks and seeds, in per cent, of the base, quantized, and of each tuned model."""

    def mean(model, variant=""):
        scores = [one.benchmarks(one.base if model is None else model, variant) for one in method.results]
        if not all(scores):
            return None
        return 100 * fmean(fmean(score.value for score in one.values()) for one in scores)

    found = {"base": mean(None)}
    if found["base"] is None:
        return {}
    tuned = method.results[0].tuned
    return found | {scheme: mean(None, scheme) for scheme in schemes} | {name: mean(name) for name in tuned}


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
        if lacking := _without_equal_compute(summary):
            names = ", ".join(f"`{name}`" for name in lacking)
            document.text(
                f"No run without SAM has the compute of {names}: whether more plain training would do as well is open."
            )


def _without_equal_compute(summary: dict) -> list[str]:
    """Runs with SAM that took more passes than any run without it."""
    took = {name: run["training"] or {} for name, run in summary["runs"].items()}
    compute = {name: one["own_steps"] * one["passes"] for name, one in took.items() if "passes" in one}
    plain = [compute[name] for name in compute if not took[name]["sam_steps"]]
    return [name for name in compute if took[name]["sam_steps"] and compute[name] > 1.05 * max(plain, default=0.0)]


def _add_quantized(document: Document, summary: dict) -> None:
    for scheme in summary["runs"][summary["reference"]]["quantized"]:
        rows, problems, counts = [], [], []
        for name, run in summary["runs"].items():
            found = run["quantized"][scheme]
            is_reference = name == summary["reference"]
            counts += [] if is_reference else [found["reduction seeds"]]
            reduction = "reference" if is_reference else _estimate(found["reduction"], problems, ".0f", "%")
            if reduction == MISSING and found["damage"] is not None:
                reduction = f"{summary['reference']} lost nothing"
            damage = _estimate(found["damage"], problems, ".4f")
            rows.append([name, _number(run["base loss"]), damage, reduction, _number(found["loss"])])
        document.heading(f"Quantized to {scheme}")
        own = [max(1, len(run["seeds"])) for run in summary["runs"].values()]
        damage, reduction = f"damage [95%, {_seeds(own)}]", f"reduction [95%, {_seeds(counts or own)}]"
        document.table(["run", "base loss", damage, reduction, "loss where it ended"], rows)
        _add_notes(document, _about_seeds(counts or own), problems)


def _add_fine_tuned(document: Document, summary: dict) -> None:
    runs = {name: run["fine-tuned"] for name, run in summary["runs"].items() if run["fine-tuned"] is not None}
    if not runs:
        return
    document.heading("Fine-tuned, at equal task loss")
    rows, problems = [], []
    for name, found in runs.items():
        if "missing" in found:
            document.text(f"`{name}` against `{summary['reference']}` at equal task loss: missing. {found['missing']}")
            continue
        problems += found["warnings"]
        rows.append(
            [
                name,
                "{:.2f} to {:.2f}".format(*found["task losses"]),
                f"{found['of the reference']:.4f} -> {found['forgetting']:.4f}",
                _estimate(found["reduction"], problems, ".1f", "%"),
                f"{found['loss of the reference']:.4f} -> {found['loss']:.4f}",
            ]
        )
    if rows:
        document.text(
            "Means over the range of task losses that both sweeps span, along curves through the runs on the frontier "
            "of each sweep."
        )
        counts = [found["seeds"] for found in runs.values() if "missing" not in found]
        reduction = f"reduction [95%, {_seeds(counts)}]"
        header = ["run", "task losses", "forgetting, reference -> run", reduction, "loss where they ended"]
        document.table(header, rows)
        _add_notes(document, _about_seeds(counts), [one for one in problems if not one.startswith("One training seed")])


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


def _estimate(values: dict | None, problems: list[str], form: str, unit: str = "") -> str:
    """An estimate as a cell of a table; why it has no interval goes to `problems`."""
    if values is None:
        return MISSING
    found = Estimate.from_dict(values)
    if found.problem:
        problems.append(f"No interval: {found.problem}")
    return found.text(form, unit=unit)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"
