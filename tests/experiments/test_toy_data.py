"""The text and the problems of the toy preset are real, and come out the same on every machine."""

import json
from pathlib import Path

import pytest
import torch

from hf_sam import commands
from hf_sam.experiments import toy_data
from hf_sam.experiments.toy_data import (
    docstrings,
    function_texts,
    functions,
    load_corpus,
    problem_texts,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def documents():
    root = Path(torch.__file__).parent
    files = sorted([*(root / "nn").rglob("*.py"), *(root / "distributions").glob("*.py"), *root.glob("*.py")])
    return [text for file in files for text in docstrings(file)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=512)


def test_too_little_text_is_told(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One line.\n\nAnother one.")
    with pytest.raises(ValueError, match=r"2 documents in all.*--text_file"):
        load_corpus(str(text))


def test_the_split_depends_on_each_document_alone(documents, tmp_path):
    texts = [" ".join(document.split()) for document in documents]
    whole, part = tmp_path / "whole.txt", tmp_path / "part.txt"
    whole.write_text("\n\n".join(texts))
    part.write_text("\n\n".join(texts[: len(texts) // 2]))
    train, held_out = load_corpus(str(whole))
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / len(train + held_out) < 0.07
    half_train, half_held_out = load_corpus(str(part))
    assert set(half_train) <= set(train)
    assert set(half_held_out) <= set(held_out)


def test_problems_have_a_question_a_worked_solution_and_a_length(tokenizer):
    pytest.importorskip("reasoning_gym", reason="the toy preset needs the extra 'recipes'")
    texts = problem_texts(tokenizer, count=4, length=400, seed=1)
    assert len(texts) == 4
    for text in texts:
        assert text["prompt"].startswith("Question: ")
        assert text["prompt"].endswith("\nAnswer:")
        assert text["completion"].startswith(" ")
        assert "Question" not in text["completion"]
        assert len(tokenizer(text["prompt"] + text["completion"])["input_ids"]) < 400
    with pytest.raises(
        ValueError, match=r"Only 0 of 16 word problems fit into 20 tokens, and 4 are needed\. Raise task_length"
    ):
        problem_texts(tokenizer, count=4, length=20, seed=1)


def test_functions_are_their_signature_and_their_body_without_the_docstring(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "@decorated\ndef long(a: int, *, b=2) -> int:\n"
        '    """Say what it does."""\n'
        "    # A comment.\n"
        "    total = sum(value for value in range(a) if value % b == 0)\n"
        "    if total > 100:\n        raise ValueError(f'{total} is more than one hundred')\n"
        '    def inner():\n        """Not an example of its own."""\n        nonlocal total\n'
        "        total = '''one\ntwo'''\n    return inner() or total\n\n"
        "def short(a):\n    return a\n"
    )
    assert functions(path) == [
        (
            "def long(a: int, *, b=2) -> int:",
            "    total = sum((value for value in range(a) if value % b == 0))\n    if total > 100:\n"
            "        raise ValueError(f'{total} is more than one hundred')\n\n    def inner():\n"
            "        nonlocal total\n        total = 'one\\ntwo'\n    return inner() or total",
        )
    ]
    path.write_text("def broken(:\n")
    assert functions(path) == []


def test_functions_have_a_length_and_no_body_comes_twice(tokenizer, monkeypatch):
    monkeypatch.setattr(toy_data, "CORPUS_PACKAGES", ("accelerate",))
    texts = function_texts(tokenizer, count=40, length=300, seed=1)
    assert len({text["completion"] for text in texts}) == 40
    for text in texts:
        compile(text["prompt"] + text["completion"], "function", "exec")
        assert len(tokenizer(text["prompt"] + text["completion"])["input_ids"]) < 300
    assert function_texts(tokenizer, count=3, length=300, seed=1) == texts[:3]
    assert function_texts(tokenizer, count=3, length=300, seed=2) != texts[:3]
    with pytest.raises(ValueError, match=r"Only \d+ of \d+ functions fit into 300 tokens, and 100000 are needed"):
        function_texts(tokenizer, count=100_000, length=300, seed=1)


def test_the_files_are_those_that_the_preset_names(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_data, "CORPUS_PACKAGES", ("accelerate",))
    pytest.importorskip("reasoning_gym", reason="the toy preset needs the extra 'recipes'")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(document.split()) for document in documents))
    argv = ["toy-data", "--text_file", str(text), "--output_dir", str(tmp_path / "data"), "--problems", "8"]
    assert commands.main(argv) == 0
    assert not (tmp_path / "data" / "functions.jsonl").exists()
    assert commands.main([*argv, "--functions", "8"]) == 0
    tasks = [(name, {"prompt", "completion"}) for name in ("problems", "functions")]
    for name, columns in (("train", {"text"}), ("held_out", {"text"}), *tasks):
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        assert {*json.loads(lines[0])} == columns
    assert (tmp_path / "data" / "tokenizer" / "tokenizer.json").exists()
    text.write_text("Too little.")
    assert commands.main(argv) == 2
    assert "--text_file a larger text" in capsys.readouterr().err
