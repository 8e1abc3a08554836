"""What the quickstart measures, and how it shows it."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import torch
from quickstart_data import IGNORED, without_common_padding
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@torch.no_grad()
def mean_loss(model: torch.nn.Module, dataset: datasets.Dataset, batch_size: int = 32) -> float:
    """Loss in nats per predicted token: the sum over all tokens divided by their number."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        batch = without_common_padding([dataset[row] for row in range(start, stop)])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total += losses.item()
        tokens += (labels != IGNORED).sum().item()
    return total / tokens


def load_nf4(path: Path) -> torch.nn.Module:
    """The model at `path` with its linear layers in bitsandbytes' 4-bit NormalFloat.

    Raises:
        RuntimeError: if loading left the model unquantized.
    """
    from bitsandbytes.nn import Linear4bit

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not quantized or any(module.weight.dtype != torch.uint8 for module in quantized):
        raise RuntimeError(f"The model loaded from {path} has no 4-bit layers: bitsandbytes did not quantize it.")
    return model


def forgetting_at(task_loss: float, runs: list[dict]) -> float | None:
    """Forgetting of a sweep of fine-tuning runs at a given task loss, interpolated linearly between its runs.

    Returns `None` where the sweep does not reach that loss or starts below it: nothing is extrapolated.
    """
    points = sorted((run["task_loss"], run["forgetting"]) for run in runs)
    losses, forgetting = zip(*points, strict=True)
    if not losses[0] <= task_loss <= losses[-1]:
        return None
    return float(np.interp(task_loss, losses, forgetting))


def matched_loss(results: dict[str, dict]) -> float | None:
    """A task loss that all sweeps span: the middle of the range that they share, or `None` if they share none."""
    low = max(min(run["task_loss"] for run in result["fine_tuning"]) for result in results.values())
    high = min(max(run["task_loss"] for run in result["fine_tuning"]) for result in results.values())
    return (low + high) / 2 if low <= high else None


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for (name, result), marker in zip(results.items(), itertools.cycle("osD^"), strict=False):
        runs = sorted(result["fine_tuning"], key=lambda run: run["task_loss"])
        axes.plot([r["task_loss"] for r in runs], [r["forgetting"] for r in runs], marker=marker, label=name)
    axes.invert_xaxis()
    axes.set_xlabel("loss on held-out word problems after fine-tuning (nats per token; better to the right)")
    axes.set_ylabel("forgetting (nats per token; lower is better)")
    axes.set_title("Learning and forgetting after fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
