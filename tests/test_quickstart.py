"""The quickstart runs from end to end, and its measures are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import olmo2, token_dataset

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

datasets = pytest.importorskip("datasets", reason="the quickstart needs the extra 'recipes'")
pytest.importorskip("bitsandbytes", reason="the quickstart needs the extra 'recipes'")

from quickstart_data import IGNORED, docstrings, load_corpus, pack, train_tokenizer, word_problems  # noqa: E402
from quickstart_measure import forgetting_at, matched_loss, mean_loss, table  # noqa: E402


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
    rows = word_problems(tokenizer, count=4, length=400, seed=1)
    assert len(rows) == 4
    for row in rows:
        prompt = tokenizer.decode(row["input_ids"][(row["labels"] == IGNORED) & (row["attention_mask"] == 1)])
        solution = tokenizer.decode(row["labels"][row["labels"] != IGNORED])
        assert prompt.startswith("Question:")
        assert prompt.endswith("Answer:")
        assert solution.endswith("<eos>")
        assert "Question" not in solution
    with pytest.raises(ValueError, match="Raise the sequence length"):
        word_problems(tokenizer, count=4, length=20, seed=1)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_mean_loss_is_per_token_whatever_the_batches(batch_size):
    model, rows = olmo2().eval(), token_dataset(rows=12)
    dataset = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows]).with_format("torch")
    total, tokens = 0.0, 0
    for row in rows:
        real = int(row["attention_mask"].sum())
        ids = row["input_ids"][:real].unsqueeze(0)
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        tokens += real - 1
    assert mean_loss(model, dataset, batch_size) == pytest.approx(total / tokens, abs=1e-5)


def sweep(*points):
    return [{"learning_rate": i, "task_loss": task, "forgetting": lost} for i, (task, lost) in enumerate(points)]


def test_forgetting_is_interpolated_inside_and_refused_outside_the_sweep():
    runs = sweep((3.0, 0.1), (2.0, 0.5), (1.0, 1.5))
    assert forgetting_at(2.5, runs) == pytest.approx(0.3)
    assert forgetting_at(1.0, runs) == pytest.approx(1.5)
    assert forgetting_at(0.9, runs) is None
    assert forgetting_at(3.1, runs) is None


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
