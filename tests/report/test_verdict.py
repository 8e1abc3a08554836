"""The verdict in words, the table of all runs, and the numbers for other programs."""

import csv
import json
import re

import numpy as np
import pytest
from test_summary import results, seeds, trained

from hf_sam.evaluation import Results
from hf_sam.report.comparison import comparison_report
from hf_sam.report.export import write_numbers
from hf_sam.report.summary import summarize
from hf_sam.report.tables import overview
from hf_sam.report.verdict import verdict, verdict_of_evaluation
from hf_sam.statistics import HeldOutLoss

# Forgetting by task loss.
SWEEP = {2.5: 0.2, 2.2: 0.3, 2.0: 0.4, 1.7: 0.5, 1.5: 0.6}


def run(name: str, base: float = 3.0, damage: float = 0.1, scale: float = 1.0) -> Results:
    return results(name, base, base + damage, {task: base + scale * lost for task, lost in SWEEP.items()})


def test_what_was_lost_where_it_ended_and_at_what_cost():
    adamw = trained(run("adamw"), 100, 0, 1.0)
    sam = trained(run("sam", base=3.05, damage=0.05, scale=0.5), 100, 100, 2.0)
    first, last = verdict(summarize([adamw, sam]))
    assert first.startswith("`sam` against `adamw`: **forgets 50.0% less** [50.0, 50.0] at equal task loss")
    assert "**loses 50.0% less** [50.0, 50.0] to `nf4`" in first
    # After fine-tuning it ends 0.05 - 0.2 lower, on average over the task losses; in 4 bits at the same loss.
    assert re.search(r"ends \*\*0\.1\d\d\d lower\*\* after fine-tuning and as high in `nf4`\.", first)
    assert "took 2.00 times the passes of `adamw`, more than any run without SAM." in first
    assert "documents only" in last
    assert "--seeds" in last
    (other, _) = verdict(summarize([sam, adamw]))
    assert "**forgets 100.0% more**" in other
    assert "0.50 times the passes" in other


def test_a_run_like_the_reference_is_neither_better_nor_worse():
    noisy = np.random.default_rng(0)
    runs = [run("one"), run("other")]
    for part in runs[1].record["parts"]:
        if part["model"] != "base" or part["variant"]:
            tokens = np.asarray(part["result"]["document_tokens"])
            wobble = noisy.normal(0, 0.02, len(tokens))
            moved = np.asarray(part["result"]["document_losses"]) + (wobble - wobble.mean() * 0.9) * tokens
            part["result"] = HeldOutLoss(moved, tokens).to_dict()
    summary = summarize(runs)
    (first, _) = verdict(summary)
    assert "forgets about as much at equal task loss" in first
    assert "loses about as much to `nf4`" in first
    assert "(may be chance)" in first
    assert "**" not in first
    _, rows = overview(summary)
    assert not any(cell.mark for row in rows for cell in row[1:] if not isinstance(cell, str))


def test_seeds_are_said():
    assert "3 or more training seeds" in verdict(summarize([*seeds("a", [0.1, 0.2, 0.3]), *seeds("b", [0.1] * 3)]))[-1]
    assert verdict(summarize([run("only")])) == ["There is only one run, `only`, and nothing to compare."]


def test_seeds_that_only_one_run_has_are_not_counted():
    """Seeds 0 to 2 against 3 to 5: there is no pair, whatever their number."""
    other = [one for one in seeds("b", [0.1] * 6) if int(one.name[-1]) > 2]
    said = verdict(summarize([*seeds("a", [0.1, 0.2, 0.3]), *other]))[-1]
    assert "share no training seed, or one only" in said


def test_a_reference_that_forgot_nothing_is_said():
    better = [
        results(name, 3.0, 3.1, {t: 3.0 - lost * s for t, lost in SWEEP.items()}) for name, s in (("a", 1), ("b", 2))
    ]
    document, summary = comparison_report(better)
    assert summary["runs"]["b"]["fine-tuned"]["reduction"] is None
    assert "a forgot nothing" in document.markdown()
    assert "forgets" not in verdict(summary)[0]


def test_many_runs_are_sorted_by_where_they_ended():
    runs = [run("reference"), *(run(f"run{i}", base=3.0 + (i * 7 % 9 - 4) / 100) for i in range(9))]
    summary = summarize(runs)
    header, rows = overview(summary)
    assert len(rows) == 10
    ends = header.index("ends lower after fine-tuning")
    lower = [0.0 if str(row[ends]) == "reference" else float(str(row[ends]).split(" [")[0]) for row in rows]
    assert lower == sorted(lower, reverse=True)
    assert lower[0] == pytest.approx(0.04)
    marks = {row[0]: row[ends].mark for row in rows}
    assert marks[rows[0][0]] == "better"
    assert marks[rows[-1][0]] == "worse"
    said = verdict(summary)
    assert len(said) <= 6
    assert f"`{rows[0][0]}` against `reference`" in said[0]
    assert "runs are in the table" in said[-2]
    document, _ = comparison_report(runs)
    assert document.title == "Comparison of 10 runs"


def test_schemes_that_are_not_shared_are_named():
    one, other = run("one"), run("other")
    other.record["settings"]["quantize"] = ["nf4", "int8"]
    other.record["parts"].append({**other.record["parts"][1], "variant": "int8"})
    summary = summarize([one, other])
    assert summary["not shared"] == {"int8": ["other"]}
    document, _ = comparison_report([one, other])
    assert "Not compared: `int8`, which only `other` was quantized to." in document.markdown()


def test_only_what_was_asked_for_is_missing():
    one, other = run("one"), run("other")
    document, _ = comparison_report([one, other])
    assert "missing" not in document.markdown()
    other.record["parts"][1]["result"] = None
    document, _ = comparison_report([one, other])
    assert "missing" in document.markdown()


def test_numbers_for_other_programs(tmp_path):
    summary = summarize([trained(run("adamw"), 10, 0, 1.0), trained(run("=sam,x", scale=0.5), 10, 10, 2.0)])
    paths = write_numbers(summary, tmp_path / "new")
    assert [path.name for path in paths] == ["summary.json", "summary.csv"]
    assert json.loads(paths[0].read_text())["runs"].keys() == summary["runs"].keys()
    with open(paths[1], newline="") as file:
        first, second = csv.DictReader(file)
    assert second["run"] == "=sam,x"
    assert float(second["forgetting_reduction_percent"]) == pytest.approx(50)
    assert float(second["forgetting_reduction_percent_low"]) == pytest.approx(50)
    assert float(second["nf4_damage"]) == pytest.approx(0.1)
    assert float(second["passes"]) == 2
    assert first["forgetting_reduction_percent"] == ""


def test_one_evaluation_in_words():
    said = verdict_of_evaluation(run("one"))
    assert said[0].startswith("Of 5 fine-tuned models these forgot least and most:")
    assert said[1].startswith(
        "`lr-2.5` **forgot** 0.2000 [0.2000, 0.2000] nats per token on `old`, where its loss is 3.2"
    )
    assert said[1].endswith("its loss on the task is 2.5000.")
    assert "`nf4` costs `base` 0.1000 [0.1000, 0.1000] nats per token, to a loss of 3.1000." in said
    assert "another seed" in said[-1]
    failed = run("failed")
    failed.record["parts"][0]["result"] = None
    assert "not known" in verdict_of_evaluation(failed)[0]
    alone = results("alone", 3.0, 3.1, {})
    alone.record["settings"]["quantize"] = []
    assert verdict_of_evaluation(alone)[0].startswith("The loss of `base` on `old` is 3.0000")


def scored(name: str, lift: float) -> Results:
    """With accuracy that falls with the task loss, lifted by a number at each."""
    one = run(name)
    for model, task in [("base", 2.6), *((f"lr-{task}", task) for task in SWEEP)]:
        share = 0.5 + 0.1 * (task - 2.5) + lift
        right = {str(i): float(i < round(200 * share)) for i in range(200)}
        value = {"task": "toy", "metric": "acc", "scores": right, "value": sum(right.values()) / 200}
        one.record["parts"].append(
            {"part": "benchmarks", "model": model, "data": "", "variant": "", "result": {"toy": value}}
        )
    return one


def test_benchmarks_are_compared_at_equal_task_loss():
    document, summary = comparison_report([scored("adamw", 0.0), scored("sam", 0.05)])
    found = summary["runs"]["sam"]["benchmarks at equal task loss"]
    assert found["difference"]["value"] == pytest.approx(5, abs=0.3)
    assert found["difference"]["low"] > 0
    assert found["task losses"] == pytest.approx([1.5, 2.5])
    base = summary["runs"]["sam"]["benchmarks"][0]
    assert base["mean"] == pytest.approx(56)
    assert base["standard error"] == pytest.approx(100 * np.sqrt(0.56 * 0.44 / 199), rel=1e-2)
    text = " ".join(document.markdown().split())
    assert "| sam | base | 56.0 ± 3.5 |" in text
    assert re.search(r"\| toy \| acc \| more \| 51\.0 ± 3\.5 → 40\.0 ± 3\.5 \| 56\.0 ± 3\.5 → 45\.0 ± 3\.5 \|", text)
    assert re.search(r"\| sam \| 1\.50 to 2\.50 \| 4\d\.\d -> \d\d\.\d \| \+[45]\.\d \[\+", text)


def test_benchmarks_of_other_tasks_or_settings_are_not_compared():
    other = scored("sam", 0.05)
    for part in other.record["parts"]:
        if part["part"] == "benchmarks":
            part["result"] = {"else": {**part["result"]["toy"], "task": "else"}}
    summary = summarize([scored("adamw", 0.0), other])
    assert "different tasks or examples" in summary["runs"]["sam"]["benchmarks at equal task loss"]["missing"]
    other = scored("sam", 0.05)
    other.record["settings"]["num_fewshot"] = 3
    document, summary = comparison_report([scored("adamw", 0.0), other])
    assert "other settings" in summary["runs"]["sam"]["benchmarks at equal task loss"]["missing"]
    assert "The benchmarks of `sam` are not compared" in document.markdown()


def test_groups_and_seeds_do_not_count_examples_twice():
    """A group holds the examples of its tasks, and all seeds answer the same examples."""
    one = scored("adamw", 0.0)
    alone = summarize([one])["runs"]["adamw"]["benchmarks"][0]
    for part in one.record["parts"]:
        if part["part"] == "benchmarks":
            part["result"]["group"] = {**part["result"]["toy"], "task": "group", "group": True}
    assert summarize([one])["runs"]["adamw"]["benchmarks"][0] == alone
    repeated = [scored(f"adamw-seed-{seed}", 0.0) for seed in range(4)]
    assert summarize(repeated)["runs"]["adamw"]["benchmarks"][0]["standard error"] == pytest.approx(
        alone["standard error"]
    )
