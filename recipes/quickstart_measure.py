"""How the quickstart shows what it measured."""

from pathlib import Path

from hf_sam.evaluation import forgetting_at, shared_range
from hf_sam.evaluation.plots import plot_frontier


def sweep(result: dict) -> list[tuple[float, float]]:
    """(task loss, forgetting) of each fine-tuning run."""
    return [(run["task_loss"], run["forgetting"]) for run in result["fine_tuning"]]


def matched_loss(results: dict[str, dict]) -> float | None:
    """A task loss that all sweeps span: the middle of the range that they share, or `None` if they share none."""
    try:
        return sum(shared_range(*map(sweep, results.values()))) / 2
    except ValueError:
        return None


def forgetting_there(task_loss: float | None, result: dict) -> float | None:
    """Forgetting of a sweep at a given task loss, or `None` where it does not span it: nothing is extrapolated."""
    try:
        return None if task_loss is None else forgetting_at(task_loss, sweep(result))
    except ValueError:
        return None


def table(results: dict[str, dict], matched: float | None) -> str:
    """The results as a Markdown table, one row for each way to anneal."""
    learning_rates = [run["learning_rate"] for run in next(iter(results.values()))["fine_tuning"]]
    header = ["anneal", "passes", "base loss", "after NF4", "NF4 damage"]
    header += [f"task loss / forgetting, LR {rate:g}" for rate in learning_rates]
    header += [
        "forgetting at equal task loss" + (f" {matched:.3f}" if matched is not None else ""),
        "held-out loss there",
    ]
    rows = [header, ["---"] * len(header)]
    reference = next(iter(results.values()))
    for name, result in results.items():
        cells = [name, str(result["passes"]), f"{result['base_loss']:.4f}", f"{result['nf4_loss']:.4f}"]
        cells.append(_with_change(result["nf4_damage"], reference["nf4_damage"], result is reference))
        cells += [f"{run['task_loss']:.3f} / {run['forgetting']:.4f}" for run in result["fine_tuning"]]
        at_matched = result["forgetting_at_matched_task_loss"]
        if at_matched is None:
            cells += ["missing", "missing"]
        else:
            lost_by_reference = reference["forgetting_at_matched_task_loss"]
            cells.append(_with_change(at_matched, lost_by_reference, result is reference))
            cells.append(f"{result['base_loss'] + at_matched:.4f}")
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def _with_change(value: float, reference: float, is_reference: bool) -> str:
    return f"{value:.4f}" if is_reference else f"{value:.4f} ({100 * (value / reference - 1):+.0f}%)"


def plot(results: dict[str, dict], path: Path) -> None:
    """Learning against forgetting: one curve for each way to anneal, one point for each fine-tuning rate."""
    path.write_bytes(plot_frontier({name: sweep(result) for name, result in results.items()}))
