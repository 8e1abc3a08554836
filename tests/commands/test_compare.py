"""`hf-sam compare`: the table of the paper out of models on disk, on one process and on two."""

import copy
import json
import shutil

import pytest
import torch
from toy import olmo2
from toy_trl import rows, tokenizer

from hf_sam.commands import main
from hf_sam.evaluation import Results


def trained(model, texts: list[str], steps: int, rate: float):
    """The model after some steps of AdamW on whole texts."""
    model, tok = copy.deepcopy(model), tokenizer()
    batch = tok(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def shelf_of_runs(tmp_path_factory):
    """Two bases that learned the old text, with a sweep of fine-tuning each."""
    folder = tmp_path_factory.mktemp("runs")
    old = [row["text"] for row in rows("text")]
    task = [row["prompt"] + row["completion"] for row in rows("completion")]
    for seed, name in enumerate(("adamw", "sam")):
        base = trained(olmo2(seed=seed), old, steps=60, rate=1e-2)
        models = {name: base}
        for rate in ("1e-05", "0.0002", "0.003"):
            models[f"{name}-sft/lr-{rate}"] = trained(base, task, steps=10, rate=float(rate))
        for place, model in models.items():
            model.save_pretrained(folder / place)
            tokenizer().save_pretrained(folder / place)
            done = {"steps": 60, "own_steps": 60, "sam_steps": 15 * seed, "passes": 1 + 0.25 * seed}
            (folder / place / "training_done.json").write_text(json.dumps(done))
    (folder / "adamw-sft" / "lr-1").mkdir()  # a run that did not end
    rows("text").to_json(folder / "old.jsonl")
    rows("completion").to_json(folder / "task.jsonl")
    return folder


def flags(folder, output):
    runs = [f"{name}={folder / name},{folder / f'{name}-sft'}" for name in ("adamw", "sam")]
    argv = ["--runs", *runs, "--data", f"old={folder / 'old.jsonl'}", "--task_data", f"task={folder / 'task.jsonl'}"]
    argv += ["--task_column", "completion", "--quantize", "rtn3", "--max_length", "16", "--output", str(output)]
    return argv


@pytest.fixture(scope="module")
def summary(shelf_of_runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    assert main(["compare", *flags(shelf_of_runs, output)]) == 0
    return json.loads((output / "comparison" / "summary.json").read_text()), output


def test_the_table_is_what_was_measured(summary):
    found, output = summary
    for name in ("adamw", "sam"):
        one = Results.read(output / name)
        run = found["runs"][name]
        before, after = one.loss(one.base, "old").loss, one.loss(one.base, "old", "rtn3").loss
        assert run["base loss"] == pytest.approx(before)
        assert run["quantized"]["rtn3"]["damage"]["value"] == pytest.approx(after - before)
        assert [row["model"] for row in run["sweep"]] == ["lr-1e-05", "lr-0.0002", "lr-0.003"]
        for row in run["sweep"]:
            assert row["forgetting"] == pytest.approx(one.loss(row["model"], "old").loss - before)
    damages = [found["runs"][name]["quantized"]["rtn3"] for name in ("adamw", "sam")]
    assert damages[0]["reduction"] is None
    first, second = (one["damage"]["value"] for one in damages)
    assert damages[1]["reduction"]["value"] == pytest.approx(100 * (1 - second / first))
    assert found["runs"]["adamw"]["fine-tuned"] is None
    tuned = found["runs"]["sam"]["fine-tuned"]
    assert tuned["of the reference"] > 0
    assert tuned["reduction"]["value"] == pytest.approx(100 * (1 - tuned["forgetting"] / tuned["of the reference"]))
    text = (output / "comparison" / "report.md").read_text()
    assert "| sam | 60 | 15 | 1.25 |" in " ".join(text.split())
    assert "31% less" in text
    assert "40% less" in text
    assert f"{second:.4f}" in text
    assert (output / "comparison" / "report.html").exists()


def test_two_processes_measure_what_one_does(launch, shelf_of_runs, summary, tmp_path):
    ended = launch("compare", flags(shelf_of_runs, tmp_path), ranks=2, strategy="ddp")
    assert ended.status == [0, 0], ended.output[0][-3000:]
    assert ended.output[1].count("What was lost") == 0
    two, one = json.loads((tmp_path / "comparison" / "summary.json").read_text()), summary[0]
    for name in ("adamw", "sam"):
        assert two["runs"][name]["base loss"] == pytest.approx(one["runs"][name]["base loss"], rel=1e-6)
        for ours, theirs in zip(two["runs"][name]["sweep"], one["runs"][name]["sweep"], strict=True):
            assert ours["task loss"] == pytest.approx(theirs["task loss"], rel=1e-6)


def test_a_second_call_measures_nothing_anew(summary, shelf_of_runs):
    found, output = summary
    measured = {path: path.stat().st_mtime_ns for path in output.glob("*/parts/*")}
    assert len(measured) >= 32
    assert main(["compare", *flags(shelf_of_runs, output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/parts/*")} == measured
    assert json.loads((output / "comparison" / "summary.json").read_text()) == found


def test_a_plan_measures_nothing(shelf_of_runs, tmp_path, capsys):
    assert main(["compare", *flags(shelf_of_runs, tmp_path / "out"), "--dry_run"]) == 0
    assert "adamw: 4 models, 16 held-out losses" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--runs"], "expected at least one argument"),
        (["--runs", "adamw"], "is not of the form NAME=BASE"),
        (["--runs", "a=x", "a=y"], "two runs have the same name"),
        (["--runs", "a=x,nowhere"], "nowhere holds no finished run"),
        (["--runs", "a=x", "--quantized", "q=y"], "--quantized belongs to one model"),
        (["--runs", "a=nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_told(shelf_of_runs, tmp_path, capsys, change, message):
    assert main(["compare", *flags(shelf_of_runs, tmp_path)[3:], *change]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-sam compare: ")
    assert message in line


def test_a_run_of_the_sweep_that_diverged_is_missing_from_the_table(shelf_of_runs, summary, tmp_path, capsys):
    """The rate was too high: the others are compared without it."""
    diverged = olmo2()
    diverged.lm_head.weight.data.fill_(float("nan"))
    sweep = tmp_path / "sft"
    shutil.copytree(shelf_of_runs / "sam-sft", sweep)
    diverged.save_pretrained(sweep / "lr-0.1")
    tokenizer().save_pretrained(sweep / "lr-0.1")
    (sweep / "lr-0.1" / "training_done.json").write_text("{}")
    argv = flags(shelf_of_runs, tmp_path / "out")
    argv[argv.index(f"sam={shelf_of_runs / 'sam'},{shelf_of_runs / 'sam-sft'}")] = (
        f"sam={shelf_of_runs / 'sam'},{sweep}"
    )
    assert main(["compare", *argv]) == 0
    err = capsys.readouterr().err
    assert "measures failed, first loss of lr-0.1: The weights of 'lr-0.1' are not finite numbers" in err
    table = json.loads((tmp_path / "out" / "comparison" / "summary.json").read_text())
    assert table["runs"] == summary[0]["runs"]
    assert "its training diverged" in (tmp_path / "out" / "sam" / "report.md").read_text()


def test_a_base_that_diverged_leaves_the_table_of_the_others(shelf_of_runs, tmp_path, capsys):
    base = olmo2()
    base.lm_head.weight.data.fill_(float("nan"))
    base.save_pretrained(tmp_path / "bad")
    tokenizer().save_pretrained(tmp_path / "bad")
    argv = flags(shelf_of_runs, tmp_path / "out")
    good = f"good={shelf_of_runs / 'adamw'},{shelf_of_runs / 'adamw-sft'}"
    for runs in ([f"bad={tmp_path / 'bad'}", good], [good, f"bad={tmp_path / 'bad'}"]):
        assert main(["compare", "--runs", *runs, *argv[3:], "--overwrite"]) == 0
        table = json.loads((tmp_path / "out" / "comparison" / "summary.json").read_text())["runs"]
        assert table["bad"]["base loss"] is None
        assert table["good"]["base loss"] > 0
        assert "missing" in capsys.readouterr().out
