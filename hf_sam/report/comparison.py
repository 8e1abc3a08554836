"""Comparison of evaluations, e.g. of AdamW (the first one, the reference) and SAM."""

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.results import Results
from ..instruments import Column, Instrument
from ..instruments.registry import group_title, groups
from ..runtime.markdown import code
from ..statistics import forgetting, inflection_point
from .document import Document
from .export import write_numbers
from .methods import SEED_PATTERN, Method, group_by_seed
from .pages import change_text, loss_text
from .plots import is_crowded, plot_costs, plot_sweeps
from .summary import benchmark_settings, summarize
from .tables import MISSING, NOT_ASKED, add_tables, add_verdict


def write_comparison(
    folders: Sequence[str | Path],
    output: str | Path,
    budgets: Sequence[float] = (),
    pattern: str = SEED_PATTERN,
) -> tuple[list[Path], dict]:
    """Write `report.md` and `report.html` that compare evaluations, `summary.json` and `summary.csv`.

    Args:
        folders (`Sequence`): output folders of `hf-sam evaluate`; the first is the reference.
        output (`str` or `Path`): where the reports go.
        budgets (`Sequence[float]`): pretraining budget of each base, for the inflection point over checkpoints.
        pattern (`str`): groups evaluations over training seeds by their names; see
            [`~hf_sam.report.methods.group_by_seed`].

    Returns:
        `tuple[list[Path], dict]`: the paths of what was written, and the summary.

    Raises:
        ValueError: if a folder holds no results, or they were measured on different data.
    """
    results = [Results.read(folder) for folder in folders]
    document, summary = comparison_report(results, budgets, pattern)
    return [*document.write(output), *write_numbers(summary, output)], summary


def comparison_report(
    results: Sequence[Results],
    budgets: Sequence[float] = (),
    pattern: str = SEED_PATTERN,
) -> tuple[Document, dict]:
    """The report that compares evaluations, and its numbers; see `write_comparison`."""
    if not results:
        raise ValueError("There is nothing to compare: name the output folders of one or more evaluations.")
    if budgets and len(budgets) != len(results):
        raise ValueError(f"There are {len(budgets)} budgets for {len(results)} evaluations; give one for each.")
    names = [one.name for one in results]
    if len(set(names)) < len(names):
        raise ValueError(f"Two evaluations have the same name ({', '.join(names)}); name them with --name.")
    reference = results[0]
    for other in results[1:]:
        _check_comparable(reference, other)
    methods = group_by_seed(results, pattern)
    few = ", ".join(method.name for method in methods)
    document = Document(f"Comparison: {few}" if len(methods) <= 4 else f"Comparison of {len(methods)} runs")
    document.text(
        f"{code(methods[0].name)} is the reference. What was lost and where it ended stand side by side, because a "
        "model that loses less may still end worse."
    )
    summary = summarize(results, pattern)
    add_verdict(document, summary)
    _sweeps(document, results, methods)
    add_tables(document, summary)
    _costs(document, summary)
    _runs(document, results)
    _bases(document, results)
    _benchmarks(document, results)
    _instruments(document, results)
    if budgets:
        _inflection(document, results, budgets)
    return document, summary


def _check_comparable(reference: Results, other: Results) -> None:
    dtypes = [one.record["settings"]["dtype"] for one in (reference, other)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(
            f"{reference.name!r} was measured in {dtypes[0]}, {other.name!r} in {dtypes[1]}; the rounding alone makes "
            "a difference. Evaluate both with the same --dtype."
        )
    for kind, names, others in (("old", reference.old, other.old), ("task", reference.tasks, other.tasks)):
        if names[:1] != others[:1]:
            raise ValueError(
                f"{reference.name!r} was measured on the {kind} data {names[:1]}, {other.name!r} on {others[:1]}. "
                "Evaluate them on the same data."
            )
        prints = [{d["name"]: d["fingerprint"] for d in one.record["data"]} for one in (reference, other)]
        if any(prints[0][name] != prints[1][name] for name in names[:1]):
            raise ValueError(
                f"The {kind} data {names[0]!r} of {reference.name!r} and {other.name!r} are not the same tokens. "
                "Evaluate them on the same documents, with the same tokenizer, --max_documents and --max_length."
            )


def _bases(document: Document, results: Sequence[Results]) -> None:
    document.heading("Base models")
    data = results[0].old[0]
    first = results[0].loss(results[0].base, data)
    rows = []
    for one in results:
        loss = one.loss(one.base, data)
        against = "" if one is results[0] else change_text(first, loss)
        rows.append([one.name, one.base, loss_text(loss), against])
    document.table(["run", "base", f"loss on {data}", "against the reference"], rows)


def _sweeps(document: Document, results: Sequence[Results], methods: Sequence[Method]) -> None:
    if not any(one.tuned for one in results):
        return
    document.heading("Learning and forgetting")
    sweeps = {one.name: one.sweep() for one in results}
    for one in results:
        if not sweeps[one.name]:
            if not one.tuned:
                why = "it has no tuned models"
            elif not one.tasks:
                why = "it has no `--task_data`"
            else:
                why = "the losses of its models are not known"
            document.text(f"{code(one.name)} is not in this comparison: {why}.")
    by_method = {m.name: [sweeps[one.name] for one in m.results if sweeps[one.name]] for m in methods}
    for m in methods:
        by_method[f"{m.name}, Wise-FT"] = [found for one in m.results if (found := one.interpolations())]
    by_method = {name: found for name, found in by_method.items() if found}
    if not by_method:
        return
    caption = "Left: what was lost, against the task loss. Right: the loss on old data where it ended. "
    caption += "Curves are means over the seeds." if is_crowded(by_method) else "95% intervals."
    document.figure("frontier", plot_sweeps(by_method), caption)


def _costs(document: Document, summary: dict) -> None:
    if (picture := plot_costs(summary)) is not None:
        document.heading("What it costs")
        caption = "How much less each run loses than the reference, and where it ended, by the cost of its training."
        document.figure("costs", picture, caption)


def _runs(document: Document, results: Sequence[Results]) -> None:
    rows = [
        [one.name, run.name, f"{run.task.loss:.4f}", f"{run.forgetting:.4f}", f"{run.after.loss:.4f}"]
        for one in results
        for run in one.sweep()
    ]
    if rows:
        document.heading("Fine-tuned models")
    document.table(["run", "tuned model", "task loss", "forgetting", "loss on old data where it ended"], rows)
    for one in results:
        known = {run.name for run in one.sweep()}
        if one.tasks and (failed := [name for name in one.tuned if name not in known]):
            document.text(
                f"Left out of {code(one.name)}, because their losses are not known: {', '.join(map(code, failed))}."
            )


def _benchmarks(document: Document, results: Sequence[Results]) -> None:
    scores = {}
    for one in results:
        if not one.benchmarks(one.base):
            continue
        if benchmark_settings(one) != benchmark_settings(results[0]):
            document.text(f"The benchmarks of {code(one.name)} are not compared: they were run with other settings.")
            continue
        scores[one.name] = one.benchmarks(one.base)
    if results[0].name not in scores:
        return
    shared = [task for task in scores[results[0].name] if all(task in found for found in scores.values())]
    if not shared:
        return
    document.heading("Benchmarks")
    document.text(
        "The base with the standard error over examples (shares in per cent), and behind the arrow its tuned model "
        "with the lowest task loss (without task data, the one that forgot least)."
    )
    rows = []
    for task in shared:
        first = scores[results[0].name][task]
        row = [task, first.metric, "more" if first.higher_is_better else "less"]
        for one in (one for one in results if one.name in scores):
            best = _best_tuned(one)
            scored = one.benchmarks(best).get(task) if best is not None else None
            after = f" → {scored.text()}" if scored is not None else ""
            row.append(f"{scores[one.name][task].text()}{after}")
        rows.append(row)
    document.table(["task", "metric", "better", *scores], rows)


def _instruments(document: Document, results: Sequence[Results]) -> None:
    """A table for each group of instruments that measure one model, with the base models of all runs."""
    for group, known in groups().items():
        asked = {name for one in results for name in one.selected(group)}
        compared = [
            (instrument, column)
            for instrument in known
            if instrument.subject == "model" and instrument.name in asked
            for column in instrument.columns
            if column.compared
        ]
        rows = [[one.name, *(_compared(i, column, one, results[0]) for i, column in compared)] for one in results]
        if compared:
            document.heading(f"{group_title(group)} of the base models")
            document.table(["run", *(column.title for _, column in compared)], rows)


def _compared(instrument: Instrument, column: Column, one: Results, reference: Results) -> str:
    """A cell; of no use where it was not asked for, or measured with other settings than those of the reference."""
    if instrument.name not in one.selected(instrument.group):
        return NOT_ASKED
    result = one.result(instrument.name, one.base)
    settings = [[run.record["settings"].get(name) for name in instrument.setting_names] for run in (one, reference)]
    if settings[0] != settings[1]:
        return "other settings"
    return MISSING if result is None else column.cell(result)


def _inflection(document: Document, results: Sequence[Results], budgets: Sequence[float]) -> None:
    document.heading("Inflection point")
    data = results[0].old[0]
    document.text(
        f"The pretraining budget beyond which the loss on {data} rises: of the base, and of the tuned model with the "
        "lowest task loss at each budget (without task data, of the one that forgot least)."
    )
    rows = []
    for kind, chosen in (("base", [one.base for one in results]), ("tuned", [_best_tuned(one) for one in results])):
        losses = [None if name is None else one.loss(name, data) for one, name in zip(results, chosen, strict=True)]
        known = {budget: loss for budget, loss in zip(budgets, losses, strict=True) if loss is not None}
        try:
            found = inflection_point([(budget, loss.loss) for budget, loss in known.items()])
        except ValueError as error:
            rows.append([kind, "missing", str(error)])
            continue
        if found is None:
            rows.append([kind, "none", "more pretraining never made it worse"])
            continue
        worse = forgetting(known[found.budget], known[max(known)])
        if not worse.low > 0:  # also where one document gives no interval
            rows.append([kind, "none", f"the rise after {found.budget:g} may be chance: {worse} nats"])
        else:
            rows.append([kind, f"{found.budget:g}", f"the last checkpoint is worse by {worse} nats"])
    document.table(["models", "inflection at", ""], rows)


def _best_tuned(one: Results) -> str | None:
    data = (*one.tasks, *one.old)[0]
    losses = {name: one.loss(name, data) for name in one.tuned}
    return min((name for name in losses if losses[name] is not None), key=lambda name: losses[name].loss, default=None)
