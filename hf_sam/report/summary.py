"""The numbers of a comparison: damage of few bits, forgetting and benchmarks at equal task loss, where runs ended."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from ..evaluation.results import Results
from ..instruments import INSTRUMENTS, BenchmarkResult
from ..statistics import (
    ScoredRun,
    TunedRun,
    damage_reduction,
    forgetting_reduction,
    mean_forgetting,
    pareto_frontier,
    score_difference,
)
from .methods import SEED_PATTERN, Method, group_by_seed, pair


def summarize(results: Sequence[Results], pattern: str = SEED_PATTERN) -> dict:
    """What each method lost, and how much less than the first one.

    Args:
        results (`Sequence[Results]`): the evaluations, grouped over training seeds by their names; the method of the
            first is the reference.
        pattern (`str`): see [`group_by_seed`].

    Returns:
        `dict`: for JSON. For each method its losses in nats per token, damage and forgetting, means over the seeds with
        their 95% intervals, reductions against the reference in per cent (positive: lost less), and differences of the
        losses where both ended (negative: ended better); None for what could not be measured.
    """
    methods = group_by_seed(results, pattern)
    reference, first = methods[0], results[0]
    data = first.old[0]
    environment = {name: value for name, value in first.record["environment"].items() if name != "command"}
    summary = {"reference": reference.name, "data": data, "environment": environment, "runs": {}}
    known = list(dict.fromkeys(scheme for one in results for scheme in one.schemes()))
    # Those that all models were quantized to.
    schemes = [scheme for scheme in known if all(scheme in one.schemes() for one in results)]
    summary["not shared"] = {
        scheme: [one.name for one in results if scheme in one.schemes()] for scheme in known if scheme not in schemes
    }
    for method in methods:
        summary["runs"][method.name] = {
            "seeds": [seed for seed in method.by_seed if seed is not None],
            "base loss": _mean_loss(method, data),
            "base difference": _difference(reference, method, data, ""),
            "training": method.results[0].training,
            "quantized": {scheme: _quantized(reference, method, data, scheme) for scheme in schemes},
            "has tuned models": any(one.tuned for one in method.results),
            "fine-tuned": _fine_tuned(reference, method) if method is not reference else None,
            "fine-tuned and quantized": {
                scheme: _fine_tuned(reference, method, scheme) if method is not reference else None
                for scheme in schemes
            },
            "wise-ft": _fine_tuned(reference, method, interpolated=True),
            "sweep": [_point(one, run) for one in method.results for run in one.sweep()],
            "benchmarks": _benchmark_means(method, schemes),
            "benchmarks at equal task loss": _scores(reference, method) if method is not reference else None,
        }
    return summary


def cost_of_training(summary: dict, name: str) -> float | None:
    """Passes over the data in the training of a base, as a multiple of those of the reference; None if not known.

    If one of them began with an earlier checkpoint, those of the other one are counted from that step on.
    """
    runs = [(summary["runs"][one]["training"] or {}) for one in (name, summary["reference"])]
    if any("passes" not in one for one in runs):
        return None
    began = [one["steps"] - one["own_steps"] for one in runs]
    passes = [first - min(began) + one["own_steps"] * one["passes"] for first, one in zip(began, runs, strict=True)]
    return passes[0] / passes[1]


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


def _difference(reference: Method, method: Method, data: str, scheme: str) -> dict | None:
    """Loss of the bases minus that of the reference, in a scheme or in full precision."""
    losses = [tuple(one.loss(one.base, data, scheme) for one in both) for both in pair(reference, method)]
    if method is reference or not losses or any(None in both for both in losses):
        return None
    return mean_forgetting(losses).to_dict()


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
        "loss difference": _difference(reference, method, data, scheme),
        "reduction": reduction,
        "reduction seeds": len(pairs),
    }


def _fine_tuned(reference: Method, method: Method, scheme: str = "", interpolated: bool = False) -> dict | None:
    """The fine-tuned models at equal task loss, in full precision or quantized; None if there are none.

    With `interpolated`, those of the method between the base and its best tuned model, against the reference itself.
    """
    pairs = pair(reference, method)
    sweeps = [
        [one.sweep(scheme) for one, _ in pairs],
        [one.interpolations() if interpolated else one.sweep(scheme) for _, one in pairs],
    ]
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
        "reduction": found.relative.scaled(100).to_dict() if found.reference > 0 else None,
        "seeds": found.seeds,
        "loss": found.end_method,
        "loss of the reference": found.end_reference,
        "loss difference": found.end_difference.to_dict(),
        "warnings": found.warnings,
        "curve": found.curve.to_dict(),
    }


def _benchmark_means(method: Method, schemes: Sequence[str]) -> list[dict]:
    """Mean accuracy over tasks and seeds, in per cent, of the base, quantized, and of each tuned model.

    The standard error is that over the examples, which all seeds share; differences between training seeds are not in
    it.
    """
    found = []
    tuned = [("fine-tuned", name, "") for name in method.results[0].tuned]
    for kind, model, variant in [("base", None, ""), *(("quantized", None, one) for one in schemes), *tuned]:
        by_seed = [_shares(one, one.base if model is None else model, variant) for one in method.results]
        if not all(by_seed) or any(_examples(one) != _examples(by_seed[0]) for one in by_seed):
            continue
        tasks = [np.mean([list(one[task].scores.values()) for one in by_seed], axis=0) for task in by_seed[0]]
        error = np.sqrt(sum(scores.var(ddof=1) / len(scores) if len(scores) > 1 else np.nan for scores in tasks))
        label = {"base": "base", "quantized": f"base in {variant}"}.get(kind, model)
        mean = fmean(fmean(score.value for score in one.values()) for one in by_seed)
        found.append(
            {"model": label, "kind": kind, "mean": 100 * mean, "standard error": float(100 * error / len(tasks))}
        )
    return found


def _shares(one: Results, model: str, variant: str = "") -> dict[str, BenchmarkResult]:
    """The scores of a model by task that are shares, e.g. accuracies; without groups, which hold the same examples."""
    scores = one.benchmarks(model, variant)
    return {task: scores[task] for task in sorted(scores) if scores[task].in_per_cent and not scores[task].group}


def _examples(scores: Mapping[str, BenchmarkResult]) -> dict:
    """What was asked: metric and examples by task."""
    return {task: (score.metric, list(score.scores)) for task, score in scores.items()}


def _scores(reference: Method, method: Method) -> dict | None:
    """Mean accuracy at equal task loss, in per cent; None without benchmarks of fine-tuned models."""
    sides = list(zip(*pair(reference, method), strict=True))
    sweeps = [[_scored_sweep(one) for one in side] for side in sides]
    if not all(len(sweep) > 1 for side in sweeps for sweep in side):
        return None
    first = sides[0][0]
    if any(benchmark_settings(one) != benchmark_settings(first) for side in sides for one in side):
        return {"missing": "The benchmarks were run with other settings."}
    runs = [scores for side in sweeps for sweep in side for _, scores in sweep]
    if any(_examples(scores) != _examples(runs[0]) for scores in runs):
        return {"missing": "The fine-tuned models were scored on different tasks or examples."}
    try:
        found = score_difference(*([[_scored_run(*run) for run in sweep] for sweep in side] for side in sweeps))
    except ValueError as error:
        return {"missing": str(error)}
    return {
        "task losses": [found.low, found.high],
        "of the reference": 100 * found.reference,
        "mean": 100 * found.method,
        "difference": found.difference.scaled(100).to_dict(),
        "seeds": len(sides[0]),
    }


def benchmark_settings(one: Results) -> dict:
    """The settings that scores depend on, without the names of the tasks."""
    names = INSTRUMENTS["benchmarks"].setting_names
    return {name: one.record["settings"].get(name) for name in names if name != "benchmarks"}


def _scored_sweep(one: Results) -> list[tuple[TunedRun, dict[str, BenchmarkResult]]]:
    """The runs on the frontier of a sweep that have scores."""
    sweep = [run for run in one.sweep() if _shares(one, run.name)]
    best = pareto_frontier([(run.task.loss, run.forgetting) for run in sweep])
    return [(sweep[i], _shares(one, sweep[i].name)) for i in best]


def _scored_run(run: TunedRun, scores: Mapping[str, BenchmarkResult]) -> ScoredRun:
    return ScoredRun(run.task, [np.asarray(list(score.scores.values())) for score in scores.values()])
