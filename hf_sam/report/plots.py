"""Pictures of a comparison. Each method has one colour and one marker in all of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..runtime.figure import literal, panels, styles
from ..statistics import Estimate, TunedRun, forgetting, pareto_frontier
from ..statistics.curves import curve
from .summary import cost_of_training

# More sweeps than this are drawn as one curve a method.
_SWEEPS_SHOWN = 12
_TASK = "held-out task loss after fine-tuning (nats per token)\nbetter to the right"


def plot_sweeps(sweeps: Mapping[str, Sequence[Sequence[TunedRun]]]) -> bytes:
    """Forgetting, and the loss on old data where it ended, against the task loss.

    Curves are those of the statistics, along the frontier of each sweep; bars are 95% intervals over documents. Runs
    off the frontier are pale. Of many sweeps, there is one curve a method, the mean over its seeds.

    Args:
        sweeps (`Mapping[str, Sequence[Sequence[TunedRun]]]`): the sweeps by method, one for each training seed.
    """
    labels = (
        (_TASK, "forgetting (nats per token)\nlower is better", "What was lost"),
        (_TASK, "loss on old data (nats per token)\nlower is better", "Where it ended"),
    )
    with panels(*labels) as (render, both):
        for name, style in styles(sweeps).items():
            if is_crowded(sweeps):
                _plot_mean(both, sweeps[name], style)
                continue
            for seed, sweep in enumerate(sweeps[name]):
                label = {"label": style["label"] if seed == 0 else "_hidden"}
                _plot_sweep(both, sweep, {**style, **label})
        for axes in both:
            axes.invert_xaxis()
        if len(sweeps) <= 4:
            both[0].legend()
        else:  # would cover the curves
            both[0].figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return render()


def is_crowded(sweeps: Mapping[str, Sequence]) -> bool:
    """Whether there are so many sweeps that only their means can be told apart."""
    return sum(map(len, sweeps.values())) > _SWEEPS_SHOWN


def plot_costs(summary: dict) -> bytes | None:
    """What each method lost less than the reference and where it ended, a row each, the cheapest training on top.

    Args:
        summary (`dict`): see [`~hf_sam.report.summary.summarize`].

    Returns:
        `bytes` or `None`: a PNG; None if the costs of fewer than two methods besides the reference are known.
    """
    reference = summary["reference"]
    names = [name for name in summary["runs"] if name != reference]
    costs = {name: cost for name in names if (cost := cost_of_training(summary, name)) is not None}
    columns = {title: found for title, found in _columns(summary).items() if any(map(found.get, costs))}
    if len(costs) < 2 or not columns:
        return None
    rows = sorted(costs, key=costs.__getitem__, reverse=True)  # the first row is the lowest
    labels = [(axis, "", title) for title, axis in columns]
    with panels(*labels, height=1.6 + 0.28 * len(rows), width=4.2) as (render, all_axes):
        for axes, by_name in zip(all_axes, columns.values(), strict=True):
            axes.axvline(0, color="grey", linewidth=0.8)
            for row, name in enumerate(rows):
                if (found := by_name.get(name)) is not None:
                    estimate = Estimate.from_dict(found)
                    style = {**styles(summary["runs"])[name], "label": None}
                    bars = _bars(estimate.value, estimate.low, estimate.high)
                    axes.errorbar(estimate.value, row, xerr=bars, **style, linestyle="", capsize=2)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_yticks(range(len(rows)), [""] * len(rows))
        all_axes[0].set_yticks(range(len(rows)), [f"{literal(name)}, {costs[name]:.2f}x" for name in rows])
        return render()


def _columns(summary: dict) -> dict[tuple[str, str], dict[str, dict | None]]:
    """Estimates by method, under a title and the label of their axis."""
    runs, reference = summary["runs"], summary["reference"]
    tuned = {name: run["fine-tuned"] or {} for name, run in runs.items()}
    less, lower = "% less than {}\nbetter to the right", "nats per token above {}\nbetter to the left"
    found = {
        ("forgetting", less.format(reference)): {name: one.get("reduction") for name, one in tuned.items()},
        ("loss after fine-tuning", lower.format(reference)): {
            name: one.get("loss difference") for name, one in tuned.items()
        },
    }
    for scheme in runs[reference]["quantized"]:
        own = {name: run["quantized"][scheme] for name, run in runs.items()}
        found[f"damage of {scheme}", less.format(reference)] = {name: one["reduction"] for name, one in own.items()}
    return found


def _plot_mean(both: Sequence, sweeps: Sequence[Sequence[TunedRun]], style: dict) -> None:
    """The mean over seeds, at the task losses that all of them span."""
    frontiers = []
    for sweep in sweeps:
        points = [(run.task.loss, run.forgetting) for run in sweep]
        frontiers.append([points[i] for i in pareto_frontier(points)])
    low, high = max(one[0][0] for one in frontiers), min(one[-1][0] for one in frontiers)
    if low > high:
        return
    losses = np.linspace(low, high, 101)
    line = np.mean([curve(points, losses) for points in frontiers], axis=0)
    before = np.mean([sweep[0].before.loss for sweep in sweeps])
    for axes, level in zip(both, (0.0, before), strict=True):
        axes.plot(losses, line + level, **{**style, "linestyle": "-"}, markevery=25)


def _plot_sweep(both: Sequence, sweep: Sequence[TunedRun], style: dict) -> None:
    points = [(run.task.loss, run.forgetting) for run in sweep]
    best = pareto_frontier(points)
    before = sweep[0].before.loss
    losses = np.linspace(points[best[0]][0], points[best[-1]][0], 101)
    line = curve([points[i] for i in best], losses)
    for axes, level in zip(both, (0.0, before), strict=True):
        axes.plot(losses, line + level, color=style["color"])
        for i, run in enumerate(sweep):
            own = style if i == best[0] else {**style, "label": "_hidden"}
            lost, learned = forgetting(run.before, run.after), run.task.interval()
            errors = {
                "xerr": _bars(learned.value, learned.low, learned.high),
                "yerr": _bars(lost.value, lost.low, lost.high),
            }
            at = points[i][0], points[i][1] + level
            axes.errorbar(*at, **errors, **own, linestyle="", capsize=2, alpha=1.0 if i in best else 0.35)


def _bars(value: float, low: float, high: float) -> np.ndarray | None:
    """Lengths of the bars on both sides; None without an interval."""
    return None if np.isnan(low) else np.asarray([[value - low], [high - value]])
