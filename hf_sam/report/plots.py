"""Pictures of a comparison. Each method has one colour and one marker in all of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..runtime.figure import panels, styles
from ..statistics import Estimate, TunedRun, forgetting, pareto_frontier
from ..statistics.curves import curve
from .summary import cost_of_training

_COST = "cost of training, in that of the reference\ncheaper to the left"
_TASK = "held-out task loss after fine-tuning (nats per token)\nbetter to the right"


def plot_sweeps(sweeps: Mapping[str, Sequence[Sequence[TunedRun]]]) -> bytes:
    """Forgetting, and the loss on old data where it ended, against the task loss.

    Curves are those of the statistics, along the frontier of each sweep; bars are 95% intervals over documents. Runs
    off the frontier are pale.

    Args:
        sweeps (`Mapping[str, Sequence[Sequence[TunedRun]]]`): the sweeps by method, one for each training seed.
    """
    labels = (
        (_TASK, "forgetting (nats per token)\nlower is better", "What was lost"),
        (_TASK, "loss on old data (nats per token)\nlower is better", "Where it ended"),
    )
    with panels(*labels) as (render, both):
        for name, style in styles(sweeps).items():
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


def plot_costs(summary: dict) -> bytes | None:
    """How much less each method loses than the reference, against the cost of its training.

    Args:
        summary (`dict`): see [`~hf_sam.report.summary.summarize`].

    Returns:
        `bytes` or `None`: a PNG; None if the costs of fewer than two methods besides the reference are known.
    """
    names = [name for name in summary["runs"] if name != summary["reference"]]
    costs = {name: cost for name in names if (cost := cost_of_training(summary, name)) is not None}
    found = {"forgetting": {name: (summary["runs"][name]["fine-tuned"] or {}).get("reduction") for name in costs}}
    for scheme in summary["runs"][summary["reference"]]["quantized"]:
        found[f"damage of {scheme}"] = {name: summary["runs"][name]["quantized"][scheme]["reduction"] for name in costs}
    found = {what: by_name for what, by_name in found.items() if any(by_name.values())}
    if len(costs) < 2 or not found:
        return None
    labels = [(_COST, f"reduction of {what} (%)\nhigher is better", what) for what in found]
    with panels(*labels) as (render, all_axes):
        for axes, by_name in zip(all_axes, found.values(), strict=True):
            axes.axhline(0, color="grey", linewidth=0.8)
            for name, style in styles(summary["runs"]).items():
                reduction = by_name.get(name)
                if reduction is not None:
                    estimate = Estimate.from_dict(reduction)
                    bars = _bars(estimate.value, estimate.low, estimate.high)
                    axes.errorbar(costs[name], estimate.value, yerr=bars, **style, linestyle="", capsize=2)
        legend = dict(pair for axes in all_axes for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        all_axes[0].figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4)
        return render()


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
