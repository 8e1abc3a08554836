"""The comparison of runs, on losses that are known."""

import numpy as np
import pytest

from hf_sam.evaluation import Results
from hf_sam.report.summary import summarize, summary_document
from hf_sam.statistics import HeldOutLoss


def loss(value: float) -> dict:
    tokens = np.full(20, 10)
    return HeldOutLoss(value * tokens.astype(float), tokens).to_dict()


def results(name: str, base: float, quantized: float, sweep: dict[float, float]) -> Results:
    """An evaluation: loss of the base, loss in few bits, and loss on old text by task loss of the fine-tuned models."""
    parts = [("base", "old", "", base), ("base", "old", "nf4", quantized)]
    for task, old in sweep.items():
        parts += [(f"lr-{task}", "old", "", old), (f"lr-{task}", "task", "", task)]
    record = {
        "name": name,
        "settings": {"quantize": ["nf4"]},
        "environment": {"command": "hf-sam compare", "torch": "2"},
        "models": [{"name": model, "spec": "nowhere"} for model in ("base", *(f"lr-{task}" for task in sweep))],
        "data": [{"name": "old", "role": "old"}, {"name": "task", "role": "task"}],
        "parts": [
            {"part": "loss", "model": model, "data": data, "variant": variant, "result": loss(value)}
            for model, data, variant, value in parts
        ],
    }
    return Results(record)


def test_a_run_that_loses_less_has_a_positive_reduction_and_one_that_loses_more_a_negative_one():
    """At a task loss of 2, half way between two runs, they forget 0.4 and 0.2; few bits cost 0.10 and 0.06."""
    more = results("more", base=3.0, quantized=3.10, sweep={2.5: 3.2, 1.5: 3.6})
    less = results("less", base=3.1, quantized=3.16, sweep={2.5: 3.2, 1.5: 3.4})
    for reference, other, forgetting, damage in ((more, less, 50.0, 40.0), (less, more, -100.0, -100 * 4 / 6)):
        summary = summarize([reference, other])
        run = summary["runs"][other.name]
        assert summary["reference"] == reference.name
        assert run["fine-tuned"]["reduction"] == pytest.approx(forgetting)
        assert run["fine-tuned"]["interval"] == pytest.approx([forgetting, forgetting])
        assert run["quantized"]["nf4"]["reduction"] == pytest.approx(damage)
        assert run["fine-tuned"]["task loss"] == pytest.approx(2.0)
    text = summary_document(summarize([more, less])).markdown()
    assert "| less | 2.0000    | 0.4000 -> 0.2000" in text
    assert "50.0% [50.0, 50.0]" in text
    assert "3.4000 -> 3.3000" in text


def test_sweeps_without_a_task_loss_in_common_are_not_compared():
    one = results("one", base=3.0, quantized=3.1, sweep={2.5: 3.4, 2.0: 3.5})
    other = results("other", base=3.0, quantized=3.1, sweep={1.5: 3.4, 1.0: 3.5})
    summary = summarize([one, other])
    assert "share no task loss" in summary["runs"]["other"]["fine-tuned"]["missing"]
    assert "`other` against `one` at equal task loss: missing" in summary_document(summary).markdown()


def test_a_reference_that_few_bits_cost_nothing_is_no_measure():
    runs = [results("lucky", 3.0, 2.99, {}), results("other", 3.0, 3.1, {})]
    summary = summarize(runs)
    assert summary["runs"]["other"]["quantized"]["nf4"]["reduction"] is None
    assert "| reference lost nothing |" in summary_document(summary).markdown()
