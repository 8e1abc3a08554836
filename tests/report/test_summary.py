"""The comparison of runs, on losses that are known."""

import numpy as np
import pytest

from hf_sam.evaluation import Results
from hf_sam.report.summary import cost_of_training, summarize
from hf_sam.report.tables import summary_document
from hf_sam.statistics import HeldOutLoss


def loss(value: float) -> dict:
    tokens = np.full(20, 10)
    return HeldOutLoss(value * tokens.astype(float), tokens).to_dict()


def results(
    name: str, base: float, quantized: float, sweep: dict[float, float], both: tuple[float, float] | None = None
) -> Results:
    """An evaluation: loss of the base, loss in few bits, and loss on old text by task loss of the fine-tuned models.

    `both` is what few bits add to the task loss and to the loss on old text of the fine-tuned models.
    """
    parts = [("base", "old", "", base), ("base", "old", "nf4", quantized)]
    for task, old in sweep.items():
        parts += [(f"lr-{task}", "old", "", old), (f"lr-{task}", "task", "", task)]
        if both is not None:
            parts += [(f"lr-{task}", "task", "nf4", task + both[0]), (f"lr-{task}", "old", "nf4", old + both[1])]
    record = {
        "name": name,
        "settings": {"quantize": ["nf4"], "dtype": "float32"},
        "environment": {"command": "hf-sam compare", "torch": "2"},
        "models": [{"name": model, "spec": "nowhere"} for model in ("base", *(f"lr-{task}" for task in sweep))],
        "data": [{"name": name, "role": name, "fingerprint": name} for name in ("old", "task")],
        "quantized": [],
        "parts": [
            {"part": "loss", "model": model, "data": data, "variant": variant, "result": loss(value)}
            for model, data, variant, value in parts
        ],
    }
    return Results(record)


def text_of(summary: dict) -> str:
    """The report of a summary, with single spaces."""
    return " ".join(summary_document(summary).markdown().split())


def test_a_run_that_loses_less_has_a_positive_reduction_and_one_that_loses_more_a_negative_one():
    """One forgets half of the other at each task loss; few bits cost 0.10 and 0.06."""
    more = results("more", base=3.0, quantized=3.10, sweep={2.5: 3.2, 2.0: 3.4, 1.5: 3.6})
    less = results("less", base=3.1, quantized=3.16, sweep={2.5: 3.2, 2.0: 3.3, 1.5: 3.4})
    for reference, other, forgetting, damage in ((more, less, 50.0, 40.0), (less, more, -100.0, -100 * 4 / 6)):
        summary = summarize([reference, other])
        run = summary["runs"][other.name]
        assert summary["reference"] == reference.name
        assert run["fine-tuned"]["reduction"]["value"] == pytest.approx(forgetting)
        # All documents are the same, and so are the shapes of both curves.
        assert run["fine-tuned"]["reduction"]["low"] == pytest.approx(forgetting)
        assert run["quantized"]["nf4"]["reduction"]["value"] == pytest.approx(damage)
        assert run["fine-tuned"]["task losses"] == pytest.approx([1.5, 2.5])
    text = text_of(summarize([more, less]))
    assert "50.0% [50.0, 50.0]" in text
    assert "| less | 1.50 to 2.50 | 0.3999 -> 0.2000" in text
    assert "reduction [95%, 1 seed]" in text
    assert "One training seed" in text


def test_models_that_are_fine_tuned_and_quantized_are_compared_at_equal_task_loss_in_few_bits():
    """At a task loss of 2.1 to 2.5 in few bits, on which both are straight lines."""
    more = results("more", 3.0, 3.1, {2.5: 3.2, 2.0: 3.4, 1.5: 3.6}, both=(0.0, 0.1))
    less = results("less", 3.1, 3.16, {2.4: 3.2, 2.0: 3.3, 1.4: 3.45}, both=(0.1, 0.02))
    summary = summarize([more, less])
    found = summary["runs"]["less"]["fine-tuned and quantized"]["nf4"]
    assert found["task losses"] == pytest.approx([1.5, 2.5])
    # Loss on old text: 4.2 - 0.4 * task + 0.1 of the one; 3.8 - 0.25 * (task - 0.1) + 0.02 of the other.
    assert found["loss of the reference"] == pytest.approx(3.5, abs=2e-3)
    assert found["loss"] == pytest.approx(3.345, abs=2e-3)
    assert found["loss difference"]["value"] == pytest.approx(-0.155, abs=3e-3)
    # Both the fine-tuning and the few bits have taken something from the base, which was 3.0 and 3.1.
    assert found["reduction"]["value"] == pytest.approx(100 * (1 - 0.245 / 0.5), abs=1)
    assert summary["runs"]["more"]["fine-tuned and quantized"] == {"nf4": None}
    text = text_of(summary)
    assert "Fine-tuned and quantized to nf4, at equal task loss" in text
    assert "| less | 1.50 to 2.50 | 0.5" in text


def with_interpolations(one: Results, model: str, losses: dict[float, tuple[float, float]]) -> Results:
    """Adds task loss and loss on old text between the base and a tuned model, by alpha."""
    one.record["settings"]["wise_ft"] = [0, *losses, 1]
    for alpha, pair in {**losses, 0: (9.0, 9.0)}.items():
        for data, value in zip(("task", "old"), pair, strict=True):
            part = {"part": "loss", "model": model, "data": data, "variant": f"wise-ft {alpha:g}"}
            one.record["parts"].append({**part, "result": loss(value)})
    return one


def test_models_between_the_base_and_its_best_tuned_model_are_a_sweep_of_their_own():
    """Forgetting of the sweep 0.4 + (2 - task) * 0.4, and between base and the last model 0.3 + (2 - task) * 0.6."""
    more = results("more", 3.0, 3.1, {2.5: 3.2, 2.0: 3.4, 1.5: 3.6})
    less = results("less", 3.0, 3.1, {2.5: 3.2, 2.0: 3.4, 1.5: 3.6})
    less = with_interpolations(less, "lr-1.5", {0.5: (2.5, 3.0), 0.7: (2.0, 3.3)})
    assert [run.name for run in less.interpolations()] == ["lr-1.5, wise-ft 0.5", "lr-1.5, wise-ft 0.7", "lr-1.5"]
    summary = summarize([more, less])
    found = summary["runs"]["less"]["wise-ft"]
    assert found["task losses"] == pytest.approx([1.5, 2.5])
    assert found["of the reference"] == pytest.approx(0.4, abs=2e-3)
    assert found["forgetting"] == pytest.approx(0.3, abs=2e-2)
    assert summary["runs"]["more"]["wise-ft"] is None
    assert f"| less, Wise-FT | 1.50 to 2.50 | 0.3999 -> {found['forgetting']:.4f} |" in text_of(summary)
    # Of the reference as well, against its own sweep.
    text = text_of(summarize([less, more]))
    assert "| less, Wise-FT |" in text
    assert "| less |" in text


def test_without_quantized_fine_tuned_models_the_report_has_no_table_of_them():
    runs = [results(name, 3.0, 3.1, {2.5: 3.2, 2.0: 3.4, 1.5: 3.6}) for name in ("one", "other")]
    summary = summarize(runs)
    assert summary["runs"]["other"]["fine-tuned and quantized"] == {"nf4": None}
    assert "Fine-tuned and quantized" not in text_of(summary)


def test_sweeps_without_a_task_loss_in_common_are_not_compared():
    one = results("one", base=3.0, quantized=3.1, sweep={2.5: 3.4, 2.0: 3.5})
    other = results("other", base=3.0, quantized=3.1, sweep={1.5: 3.4, 1.0: 3.5})
    summary = summarize([one, other])
    assert "share no task loss" in summary["runs"]["other"]["fine-tuned"]["missing"]
    assert "`other` against `one` at equal task loss: missing" in text_of(summary)


def test_a_reference_that_few_bits_cost_nothing_is_no_measure():
    runs = [results("lucky", 3.0, 2.99, {}), results("other", 3.0, 3.1, {})]
    summary = summarize(runs)
    assert summary["runs"]["other"]["quantized"]["nf4"]["reduction"] is None
    assert "| lucky lost nothing |" in text_of(summary)


def seeds(name: str, damages: list[float]) -> list[Results]:
    return [results(f"{name}-seed-{seed}", 3.0, 3.0 + damage, {}) for seed, damage in enumerate(damages)]


def test_evaluations_are_grouped_over_their_seeds():
    """Student's t of three pairs of seeds: documents are all the same."""
    runs = [*seeds("adamw", [0.10, 0.12, 0.11]), *seeds("sam", [0.05, 0.07, 0.06])]
    summary = summarize(runs)
    assert list(summary["runs"]) == ["adamw", "sam"]
    assert summary["runs"]["sam"]["seeds"] == [0, 1, 2]
    damage = summary["runs"]["sam"]["quantized"]["nf4"]["damage"]
    assert damage["value"] == pytest.approx(0.06)
    assert damage["high"] - damage["value"] == pytest.approx(0.01 / np.sqrt(3) * 4.303, rel=1e-3)
    reduction = summary["runs"]["sam"]["quantized"]["nf4"]["reduction"]
    assert reduction["value"] == pytest.approx(100 * (1 - 0.06 / 0.11))
    assert reduction["low"] < reduction["value"] < reduction["high"]
    assert "damage [95%, 3 seeds] | reduction [95%, 3 seeds]" in text_of(summary)


def test_seeds_that_one_method_lacks_are_left_out_of_its_reduction():
    runs = [*seeds("adamw", [0.10, 0.12, 0.11]), *seeds("sam", [0.05, 0.07])]
    summary = summarize(runs)
    sam = summary["runs"]["sam"]["quantized"]["nf4"]
    assert sam["reduction"]["value"] == pytest.approx(100 * (1 - 0.06 / 0.11))
    assert sam["reduction seeds"] == 2
    assert "damage [95%, 2 to 3 seeds] | reduction [95%, 2 seeds]" in text_of(summary)


def trained(one: Results, steps: int, sam_steps: int, passes: float) -> Results:
    counts = {"steps": steps, "own_steps": steps, "sam_steps": sam_steps, "passes": passes}
    one.record["models"][0]["training"] = counts
    return one


def test_a_run_that_began_earlier_is_compared_from_that_step_on():
    """As many passes in all: 100 + 20 of the one, 80 + 2 * 20 of the other."""
    adamw, sam, later = (results(name, 3.0, 3.1, {}) for name in ("adamw", "sam-earlier", "sam"))
    for one, steps, passes in ((adamw, 120, 1.0), (sam, 100, 2.0), (later, 120, 2.0)):
        one.record["models"][0]["training"] = {"steps": steps, "own_steps": 20, "sam_steps": 20, "passes": passes}
    adamw.record["models"][0]["training"]["sam_steps"] = 0
    summary = summarize([adamw, sam, later])
    assert [cost_of_training(summary, name) for name in summary["runs"]] == [1.0, 1.0, 2.0]
    assert "No run without SAM has the compute of `sam`:" in text_of(summary)


def test_a_run_with_sam_without_its_equal_compute_is_said():
    adamw = trained(results("adamw", 3.0, 3.1, {}), 100, 0, 1.0)
    sam = trained(results("sam", 3.0, 3.05, {}), 100, 100, 2.0)
    more = trained(results("more", 2.9, 3.05, {}), 200, 0, 1.0)
    assert "No run without SAM has the compute of `sam`" in text_of(summarize([adamw, sam]))
    assert "No run without SAM" not in text_of(summarize([adamw, sam, more]))
    assert "| sam | 100 | 100 | 2.00 |" in text_of(summarize([adamw, sam, more]))
