"""`summary.json` and `summary.csv`: the numbers of a comparison for other programs."""

import csv
from pathlib import Path

from ..runtime.disk import write_json

_ENDS = ("value", "low", "high")


def write_numbers(summary: dict, folder: str | Path) -> list[Path]:
    """Write `summary.json`, which holds everything, and `summary.csv` with a line for each run; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    lines = [_line(name, run) for name, run in summary["runs"].items()]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    with open(folder / "summary.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    return [folder / "summary.json", folder / "summary.csv"]


def _line(name: str, run: dict) -> dict:
    training, fine_tuned = run["training"] or {}, run["fine-tuned"] or {}
    line = {
        "run": name,
        "seeds": len(run["seeds"]),
        "steps": training.get("own_steps"),
        "sam_steps": training.get("sam_steps"),
        "passes": training.get("passes"),
        "base_loss": run["base loss"],
        **_estimate("base_difference", run["base difference"]),
        "forgetting": fine_tuned.get("forgetting"),
        **_estimate("forgetting_reduction_percent", fine_tuned.get("reduction")),
        "fine_tuned_loss": fine_tuned.get("loss"),
        **_estimate("fine_tuned_loss_difference", fine_tuned.get("loss difference")),
    }
    if interpolated := run["wise-ft"]:
        line |= _estimate("wise_ft_forgetting_reduction_percent", interpolated.get("reduction"))
        line |= _estimate("wise_ft_loss_difference", interpolated.get("loss difference"))
    for scheme, quantized in run["quantized"].items():
        line |= _estimate(f"{scheme}_damage", quantized["damage"])
        line |= _estimate(f"{scheme}_reduction_percent", quantized["reduction"])
        line[f"{scheme}_loss"] = quantized["loss"]
        line |= _estimate(f"{scheme}_loss_difference", quantized["loss difference"])
        both = run["fine-tuned and quantized"][scheme] or {}
        line[f"fine_tuned_{scheme}_loss"] = both.get("loss")
        line |= _estimate(f"fine_tuned_{scheme}_loss_difference", both.get("loss difference"))
    for found in run["benchmarks"]:
        line[f"accuracy_percent_{found['model']}"] = found["mean"]
    matched = run["benchmarks at equal task loss"] or {}
    return line | _estimate("accuracy_difference_at_equal_task_loss", matched.get("difference"))


def _estimate(name: str, values: dict | None) -> dict:
    values = values or {}
    return {name if end == "value" else f"{name}_{end}": values.get(end) for end in _ENDS}
