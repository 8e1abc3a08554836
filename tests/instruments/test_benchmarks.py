"""Benchmarks through the harness, from local task files."""

import json
import math

import numpy as np
import pytest
import torch
from toy_evaluation import busy, moved, sharp_olmo2, unchanged
from toy_tasks import TASK, write_task
from toy_trl import tokenizer

from hf_sam.instruments import OLMES_CORE_9, BenchmarkResult, run_benchmarks, score_change
from hf_sam.instruments.benchmarks import check_tasks, load_tasks
from hf_sam.quantizers import quantized

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("tasks"))


def predictions(model, folder) -> list[float]:
    """Which questions the model gets right, without the harness: the choice with the largest probability."""
    scores = []
    for line in (folder / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer()(row["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model.eval()(ids).logits[0, -1]
        choices = [tokenizer()(choice)["input_ids"][0] for choice in row["choices"]]
        scores.append(float(last[choices].argmax() == row["answer"]))
    return scores


def test_scores_are_those_of_the_model(folder):
    model = busy(sharp_olmo2())
    with unchanged(model):
        results = run_benchmarks(model, tokenizer(), ["toy_choice"], num_fewshot=0, include_path=folder)
    result = results["toy_choice"]
    expected = predictions(model, folder)
    assert [result.scores[str(i)] for i in range(24)] == expected
    assert result.value == pytest.approx(sum(expected) / 24)
    assert result.metric == "acc"
    assert 0 < result.value < 1
    limited = run_benchmarks(model, tokenizer(), ["toy_choice"], num_fewshot=0, include_path=folder, limit=5)
    assert limited["toy_choice"].scores == {str(i): expected[i] for i in range(5)}


def test_quantized_models_can_be_scored_and_compared(folder):
    model = sharp_olmo2()
    before = run_benchmarks(model, tokenizer(), ["toy_choice"], include_path=folder)["toy_choice"]
    with quantized(model, "nf4") as (small, _):
        after = run_benchmarks(small, tokenizer(), ["toy_choice"], include_path=folder)["toy_choice"]
    change = score_change(before, after)
    assert change.value == pytest.approx(after.value - before.value)
    assert change.low <= change.value <= change.high


def test_change_pairs_the_examples():
    scores = {str(i): float(i % 2) for i in range(100)}
    before = BenchmarkResult("t", "acc", scores, 0.5)
    change = score_change(before, BenchmarkResult("t", "acc", {**scores, "0": 1.0}, 0.51))
    assert change.value == pytest.approx(0.01)
    # A single example that changed may be chance, though all the others are equal.
    assert -0.03 < change.low < 0 < change.high < 0.05
    # Nor do equal answers prove that there is no change at all: 3 of 100 is what 100 examples can exclude.
    same = score_change(before, before)
    assert (same.value, same.high) == (0, -same.low)
    assert 0.02 < same.high < 0.04
    assert before.standard_error == pytest.approx(0.0503, abs=1e-4)
    with pytest.raises(ValueError, match="different examples"):
        score_change(before, BenchmarkResult("t", "acc", {"0": 1.0}, 1.0))


ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: {metric}
"""


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_perplexities_are_scores_where_less_is_better(folder, tmp_path, metric):
    (tmp_path / "roll.yaml").write_text(ROLLING.format(name="roll", folder=folder, metric=metric))
    load_tasks(["roll"], tmp_path)
    model = sharp_olmo2()
    before = run_benchmarks(model, tokenizer(), ["roll"], include_path=tmp_path, num_fewshot=0)["roll"]
    assert before.metric == metric
    assert not before.higher_is_better
    assert not before.in_per_cent
    units = [len(f"w{i} w{i + 1}") if "byte" in metric else 2 for i in range(24)]
    assert list(before.weights.values()) == units
    mean = sum(before.scores.values()) / sum(units)
    assert before.value == pytest.approx(mean if metric == "bits_per_byte" else math.exp(mean), rel=1e-5)
    # The interval of a change holds what a resampling of the examples finds.
    after = run_benchmarks(moved(model), tokenizer(), ["roll"], include_path=tmp_path, num_fewshot=0)["roll"]
    change = score_change(before, after)
    assert change.value == pytest.approx(after.value - before.value)
    generator = np.random.default_rng(0)
    values = [np.asarray(list(one.scores.values())) for one in (before, after)]
    found = []
    for _ in range(2000):
        chosen = generator.integers(24, size=24)
        means = [one[chosen].sum() / np.asarray(units)[chosen].sum() for one in values]
        found.append(np.subtract(*(means if metric == "bits_per_byte" else np.exp(means))[::-1]))
    low, high = np.quantile(found, [0.025, 0.975])
    assert change.low == pytest.approx(low, abs=0.3 * (high - low))
    assert change.high == pytest.approx(high, abs=0.3 * (high - low))
    assert BenchmarkResult.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_means_of_other_metrics_are_scores(folder, tmp_path):
    """Any metric that is a mean over examples, with the direction that its task declares."""
    text = TASK.format(name="by_bytes", folder=folder).replace("metric: acc", "metric: acc_bytes")
    (tmp_path / "bytes.yaml").write_text(text.replace("higher_is_better: true", "higher_is_better: false"))
    load_tasks(["by_bytes"], tmp_path)
    result = run_benchmarks(sharp_olmo2(), tokenizer(), ["by_bytes"], include_path=tmp_path, num_fewshot=0)["by_bytes"]
    assert result.metric == "acc_bytes"
    assert not result.higher_is_better
    assert result.value == pytest.approx(np.mean(list(result.scores.values())))


def test_the_precision_of_benchmarks_may_be_another(folder):
    model = sharp_olmo2()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    options = {"tasks": ["toy_choice"], "num_fewshot": 0, "include_path": folder, "limit": 2}
    run_benchmarks(model, tokenizer(), **options)
    assert set(seen) == {torch.float32}
    seen.clear()
    run_benchmarks(model, tokenizer(), **options, dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert model.dtype == torch.float32


@pytest.mark.slow  # the harness takes a while to find its own tasks
def test_the_default_tasks_exist_and_others_are_told_before(folder):
    assert check_tasks(OLMES_CORE_9) == list(OLMES_CORE_9)
    assert check_tasks(["toy_choice"], folder) == ["toy_choice"]
    with pytest.raises(ValueError, match="no task 'toy_choice', 'arc_eazy'"):
        check_tasks(["toy_choice", "arc_easy", "arc_eazy"])
    with pytest.raises(ValueError, match="no folder 'not/there'"):
        check_tasks(["arc_easy"], "not/there")


def test_the_model_is_left_as_it_was(folder):
    model, calls = busy(sharp_olmo2()), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.lm_head.register_forward_hook(interrupt)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run_benchmarks(model, tokenizer(), ["toy_choice"], include_path=folder)


def test_groups_are_scored_by_all_their_examples(folder, tmp_path):
    (tmp_path / "toy.yaml").write_text(TASK.format(name="toy_choice", folder=folder))
    (tmp_path / "other.yaml").write_text(TASK.format(name="other_choice", folder=folder))
    (tmp_path / "group.yaml").write_text(
        "group: toy_group\ntask:\n  - toy_choice\n  - other_choice\naggregate_metric_list:\n  - metric: acc\n"
    )
    results = run_benchmarks(sharp_olmo2(), tokenizer(), ["toy_group"], num_fewshot=0, include_path=tmp_path, limit=6)
    assert set(results) == {"toy_choice", "other_choice", "toy_group"}
    assert results["toy_group"].value == pytest.approx(
        (results["toy_choice"].value + results["other_choice"].value) / 2
    )
    assert len(results["toy_group"].scores) == 12


def test_tasks_that_cannot_be_judged_or_loaded_are_told_before(folder, tmp_path):
    load_tasks(["toy_choice"], folder)
    text = TASK.format(name="odd", folder=folder)
    (tmp_path / "odd.yaml").write_text(
        text.replace("metric: acc", "metric: bleu").replace("aggregation: mean", "aggregation: bleu")
    )
    (tmp_path / "gone.yaml").write_text(TASK.format(name="gone", folder="/nowhere"))
    with pytest.raises(ValueError, match="judged by bleu"):
        load_tasks(["odd"], tmp_path)
    with pytest.raises(ValueError, match="data of the task 'gone' cannot be loaded"):
        load_tasks(["gone"], tmp_path)
