"""The quickstart runs from end to end, and its measures are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sam.evaluation import held_out_loss
from hf_sam.evaluation.sources import load_held_out

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

datasets = pytest.importorskip("datasets", reason="the quickstart needs the extra 'recipes'")
pytest.importorskip("bitsandbytes", reason="the quickstart needs the extra 'recipes'")

from quickstart_data import (  # noqa: E402
    IGNORED,
    docstrings,
    load_corpus,
    pack,
    problem_texts,
    tokenized,
    train_tokenizer,
)
from quickstart_measure import forgetting_there, matched_loss, table  # noqa: E402


@pytest.fixture(scope="module")
def documents():
    root = Path(torch.__file__).parent
    files = sorted([*(root / "nn").rglob("*.py"), *(root / "distributions").glob("*.py"), *root.glob("*.py")])
    return [text for file in files for text in docstrings(file)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=512)


def test_quickstart_runs_and_writes_what_it_says(tmp_path, documents):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(document.split()) for document in documents))
    small = ["--pretrain_steps", "12", "--anneal_steps", "4", "--short_anneal_steps", "2", "--fine_tune_steps", "3"]
    command = [sys.executable, str(RECIPES / "quickstart.py"), "--text_file", str(text), "--output_dir", str(tmp_path)]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AdamW, shortened" in done.stdout
    assert "100%" in done.stderr  # the progress bar went all the way
    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report["results"]) == {"AdamW", "SAM rho 0.4", "AdamW, shortened", "AdamW, equal compute"}
    assert [result["passes"] for result in report["results"].values()] == [4, 8, 2, 8]
    for result in report["results"].values():
        assert result["nf4_damage"] == pytest.approx(result["nf4_loss"] - result["base_loss"])
        assert len(result["fine_tuning"]) == 3
        assert 0 < result["base_loss"] < 7
    assert report["environment"]["torch"] == torch.__version__
    assert (tmp_path / "learning_forgetting.png").stat().st_size > 10_000
    # Everything is there for the command line, and gives the same losses.
    for kind in ("model", *(f"tuned-{run['learning_rate']:g}" for run in report["results"]["AdamW"]["fine_tuning"])):
        assert (tmp_path / "adamw-shortened" / kind / "model.safetensors").exists()
        assert (tmp_path / "adamw-shortened" / kind / "tokenizer.json").exists()
    _, problems = load_held_out(
        str(tmp_path / "data" / "problems.jsonl"),
        AutoTokenizer.from_pretrained(tmp_path / "adamw" / "model"),
        column="completion",
    )
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "adamw" / "tuned-0.0002")
    recorded = report["results"]["AdamW"]["fine_tuning"][0]["task_loss"]
    assert held_out_loss(tuned, problems).loss == pytest.approx(recorded, rel=1e-5)
    # All four come from one checkpoint, and the SAM phase made a difference.
    losses = {name: result["base_loss"] for name, result in report["results"].items()}
    assert len(set(losses.values())) == 4


def test_too_little_text_is_told(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One line.\n\nAnother one.")
    with pytest.raises(ValueError, match=r"2 documents in all.*--text_file"):
        load_corpus(str(text))


def test_packing_keeps_every_token_in_order(documents, tokenizer):
    rows = pack(documents[:50], tokenizer, length=64)["input_ids"]
    flat = [token for row in rows for token in row.tolist()]
    expected = [t for document in documents[:50] for t in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 64


def test_word_problems_train_on_the_solution_only(tokenizer):
    pytest.importorskip("reasoning_gym", reason="the quickstart needs the extra 'recipes'")
    rows = tokenized(problem_texts(tokenizer, count=4, length=400, seed=1), tokenizer, length=400)
    assert len(rows) == 4
    for row in rows:
        prompt = tokenizer.decode(row["input_ids"][(row["labels"] == IGNORED) & (row["attention_mask"] == 1)])
        solution = tokenizer.decode(row["labels"][row["labels"] != IGNORED])
        assert prompt.startswith("Question:")
        assert prompt.endswith("Answer:")
        assert solution.endswith("<eos>")
        assert "Question" not in solution
    with pytest.raises(ValueError, match="Raise the sequence length"):
        problem_texts(tokenizer, count=4, length=20, seed=1)


def sweep(*points):
    return [{"learning_rate": i, "task_loss": task, "forgetting": lost} for i, (task, lost) in enumerate(points)]


def test_forgetting_is_interpolated_inside_and_refused_outside_the_sweep():
    result = {"fine_tuning": sweep((3.0, 0.1), (2.0, 0.5), (1.0, 1.5))}
    assert forgetting_there(2.5, result) == pytest.approx(0.3)
    assert forgetting_there(1.0, result) == pytest.approx(1.5)
    assert forgetting_there(0.9, result) is None
    assert forgetting_there(None, result) is None


def test_sweeps_that_share_no_task_loss_read_missing():
    results = {
        name: {
            "passes": 1,
            "base_loss": 1.0,
            "nf4_loss": 1.1,
            "nf4_damage": 0.1,
            "fine_tuning": runs,
            "forgetting_at_matched_task_loss": None,
        }
        for name, runs in (("a", sweep((3.0, 0.1), (2.5, 0.5))), ("b", sweep((2.0, 0.1), (1.0, 0.5))))
    }
    assert matched_loss(results) is None
    assert table(results, None).count("missing") == 4
    assert (
        matched_loss({"a": {"fine_tuning": sweep((3, 0), (1, 1))}, "b": {"fine_tuning": sweep((2, 0), (0, 1))}}) == 1.5
    )
