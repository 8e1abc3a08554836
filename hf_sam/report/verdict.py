"""The verdict of a comparison in words: what was lost, where it ended, at what cost, and how sure that is."""

from collections.abc import Mapping

from ..evaluation.results import Results
from ..runtime.markdown import code
from ..statistics import Estimate, forgetting
from .summary import cost_of_training

# More fine-tuned models than this are not listed one by one.
_SHOWN = 4


def verdict(summary: dict) -> list[str]:
    """A few sentences for each run but the reference, and one about how sure they are.

    Of many runs, those that ended best and that lost least; the table has the others.
    """
    reference = code(summary["reference"])
    others = {name: run for name, run in summary["runs"].items() if name != summary["reference"]}
    if not others:
        return [f"There is only one run, {reference}, and nothing to compare."]
    found = []
    shown = list(others) if len(others) <= _SHOWN else _best(others)
    for name in shown:
        run = others[name]
        parts = [f"{code(name)} against {reference}: {_lost(run)}", _ended(run), _cost(summary, name)]
        found.append(" ".join(part for part in parts if part))
    if len(shown) < len(others):
        found.append(f"These ended best or lost least; the other {len(others) - len(shown)} runs are in the table.")
    return [*found, _certainty(summary)]


def _best(runs: dict) -> list[str]:
    """Names of the runs that ended best and that lost least, in each respect in which all can be compared."""
    chosen: list[str] = []
    for part, key, sign in (("fine-tuned", "loss difference", 1), ("fine-tuned", "reduction", -1)):
        values = {name: (run[part] or {}).get(key) for name, run in runs.items()}
        known = {name: sign * value["value"] for name, value in values.items() if value and value["value"] is not None}
        chosen += [min(known, key=known.get)] if known else []
    for scheme in next(iter(runs.values()))["quantized"]:
        for key, sign in (("loss difference", 1), ("reduction", -1)):
            values = {name: run["quantized"][scheme][key] for name, run in runs.items()}
            known = {name: sign * one["value"] for name, one in values.items() if one and one["value"] is not None}
            chosen += [min(known, key=known.get)] if known else []
    return list(dict.fromkeys(chosen))[:_SHOWN]


def verdict_of_evaluation(results: Results) -> list[str]:
    """What fine-tuning and few bits cost, in one sentence a model, and how sure that is."""
    data = results.old[0]
    base = results.loss(results.base, data)
    if base is None:
        return [f"The loss of the base {code(results.base)} on {code(data)} is not known; see the table of failures."]
    found = []
    runs = [(name, results.loss(name, data)) for name in results.tuned]
    known = sorted((run for run in runs if run[1] is not None), key=lambda run: run[1].loss)
    shown = known if len(known) <= _SHOWN else [known[0], known[-1]]
    if shown is not known:
        found.append(f"Of {len(known)} fine-tuned models these forgot least and most:")
    for name, loss in shown:
        lost = forgetting(base, loss)
        sentence = f"{code(name)} {_forgot(lost)} on {code(data)}, where its loss is {loss.loss:.4f}"
        task = results.loss(name, results.tasks[0]) if results.tasks else None
        found.append(f"{sentence}." if task is None else f"{sentence}; its loss on the task is {task.loss:.4f}.")
    if missing := [name for name, loss in runs if loss is None]:
        found.append(f"Not known, see the table of failures: {', '.join(map(code, missing))}.")
    for scheme in results.schemes():
        after = results.loss(results.base, data, scheme)
        if after is not None:
            costs = forgetting(base, after)
            found.append(
                f"{code(scheme)} costs {code(results.base)} {costs} nats per token, to a loss of {after.loss:.4f}."
            )
    if not found:
        found.append(f"The loss of {code(results.base)} on {code(data)} is {base.interval()} nats per token.")
    return [*found, "How sure: intervals (95%) are over documents; training with another seed may change more."]


def _forgot(lost: Estimate) -> str:
    if lost.problem:
        return f"forgot {lost} nats per token"
    if lost.low <= 0 <= lost.high:
        return f"forgot {lost} nats per token, which may be none,"
    return (
        f"**forgot** {lost} nats per token" if lost.value > 0 else f"**improved** by {lost.scaled(-1.0)} nats per token"
    )


def _lost(run: dict) -> str:
    fine_tuned = (run["fine-tuned"] or {}).get("reduction")
    clauses = [] if fine_tuned is None else [_more_or_less("forgets", fine_tuned, " at equal task loss", ".1f")]
    for scheme, quantized in run["quantized"].items():
        if quantized["reduction"] is not None:
            clauses.append(_more_or_less("loses", quantized["reduction"], f" to {code(scheme)}", ".1f"))
    if not clauses:
        return "what they lost cannot be compared."
    return f"{_joined(clauses)}."


def _more_or_less(verb: str, reduction: Mapping, what: str, form: str) -> str:
    one = Estimate.from_dict(dict(reduction))
    number = f"{abs(one.value):{form}}%"
    if one.problem:
        return f"{verb} about {number} {'less' if one.value > 0 else 'more'}{what} (no interval)"
    ends = sorted((abs(one.low), abs(one.high))) if one.low * one.high > 0 else (one.low, one.high)
    span = f"[{ends[0]:z{form}}, {ends[1]:z{form}}]"
    if one.low > 0:
        return f"**{verb} {number} less** {span}{what}"
    if one.high < 0:
        return f"**{verb} {number} more** {span}{what}"
    return f"{verb} about as much{what} (a reduction of {one.value:z{form}}% {span})"


def _ended(run: dict) -> str:
    clauses = []
    end = (run["fine-tuned"] or {}).get("loss difference")
    if end is not None:
        clauses.append(_higher_or_lower(end, "after fine-tuning"))
    for scheme, quantized in run["quantized"].items():
        if quantized["loss difference"] is not None:
            clauses.append(_higher_or_lower(quantized["loss difference"], f"in {code(scheme)}"))
    if not clauses and run["base difference"] is not None:
        clauses.append(_higher_or_lower(run["base difference"], "as a base"))
    return f"Its loss ends {_joined(clauses)}." if clauses else ""


def _higher_or_lower(difference: Mapping, where: str) -> str:
    one = Estimate.from_dict(dict(difference))
    number = f"{abs(one.value):.4f}"
    if float(number) == 0 and (one.problem or one.low == one.high or one.low <= 0 <= one.high):
        return f"as high {where}"
    direction = "higher" if one.value > 0 else "lower"
    if one.problem or one.low <= 0 <= one.high:
        return f"{number} {direction} {where} (may be chance)"
    return f"**{number} {direction}** {where}"


def _cost(summary: dict, name: str) -> str:
    cost = cost_of_training(summary, name)
    if cost is None:
        return ""
    sentence = f"Its training took {cost:.2f} times the passes of {code(summary['reference'])}"
    return f"{sentence}, more than any run without SAM." if name in without_equal_compute(summary) else f"{sentence}."


def _certainty(summary: dict) -> str:
    counts = []
    for name, run in summary["runs"].items():
        if name != summary["reference"]:
            counts += [found["reduction seeds"] for found in run["quantized"].values()]
            counts += [run["fine-tuned"]["seeds"]] if "seeds" in (run["fine-tuned"] or {}) else []
    if min(counts, default=1) < 2 <= max((len(run["seeds"]) for run in summary["runs"].values()), default=1):
        return (
            "How sure: some runs share no training seed, or one only, with the reference; their intervals are over "
            "documents only. Train both with the same three seeds or more."
        )
    if min(counts, default=1) < 2:
        return (
            "How sure: intervals are over documents only. Training with another seed may change these numbers by more "
            "than that; repeat it with three seeds or more (`--seeds`) before you rely on them."
        )
    return f"How sure: intervals are over documents and {min(counts)} or more training seeds that both runs have."


def without_equal_compute(summary: dict) -> list[str]:
    """Runs with SAM that took more passes than any run without it."""
    took = {name: run["training"] or {} for name, run in summary["runs"].items()}
    costs = {name: cost_of_training(summary, name) for name in took}
    compute = {name: cost for name, cost in costs.items() if cost is not None}
    plain = [compute[name] for name in compute if not took[name]["sam_steps"]]
    return [name for name in compute if took[name]["sam_steps"] and compute[name] > 1.05 * max(plain, default=0.0)]


def _joined(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
