"""`--dry_run`: what will be measured and how long it takes, without measuring anything."""

import json
import re

import pytest
import torch
from toy_tasks import write_task
from toy_trl import tokenizer

from hf_sam import commands
from hf_sam.evaluation import EvaluationArguments
from hf_sam.evaluation.dry_run import PEAKS, Work, _hours
from hf_sam.instruments.benchmarks import benchmark_dtype, benchmark_tokens, run_benchmarks
from hf_sam.runtime.models import find_model


def command(shelf, output, *extra):
    argv = ["evaluate", "--base", str(shelf / "base"), "--tuned", str(shelf / "tuned1"), "--max_length", "64"]
    argv += ["--data", str(shelf / "old.jsonl"), "--quantize", "rtn3", "nf4", "--sharpness", "kl"]
    return commands.main([*argv, "--output", str(output), *extra, "--dry_run"])


def test_the_plan(shelf, tmp_path, capsys):
    assert command(shelf, tmp_path / "out", "--sharpness_documents", "4", "--wise_ft", "0.5") == 0
    printed = capsys.readouterr().out
    assert "2 models, 7 with their quantized and interpolated variants" in printed
    found = dict(re.findall(r"^\| (held-out loss|sharpness: kl)\s+\|\s+([\d,]+)", printed, re.MULTILINE))
    texts = [line["text"] for line in map(json.loads, (shelf / "old.jsonl").read_text().splitlines())]
    lengths = [len(ids) for ids in tokenizer()(texts)["input_ids"]]
    assert found["held-out loss"] == f"{7 * sum(lengths):,}"
    assert found["sharpness: kl"] == f"{2 * 11 * sum(lengths[:4]):,}"
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_told(shelf, tmp_path, capsys):
    assert command(shelf, tmp_path / "out", "--data", "nowhere.jsonl") == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_hours():
    """A 1B model that reads 1 million tokens: 2e15 FLOP, of which an H100 does 26.8e12 a second in fp32."""
    assert _hours(Work("x", 10**6, "float32"), 10**9, PEAKS["H100"]) == pytest.approx(2e15 / (0.4 * 67e12) / 3600)


def test_tokens_of_benchmarks_are_those_that_a_model_reads(shelf, tmp_path):
    """The harness strips nothing here: each of the 4 choices of 24 questions is read with its question."""
    folder = str(write_task(tmp_path))
    settings = EvaluationArguments(base="x", data=["x"], benchmarks=["toy_choice"], task_folder=folder, num_fewshot=0)
    model = find_model(str(shelf / "base")).load(torch.float32)
    read = []

    def remember(module, args, kwargs):
        read.append(args[0] if args else kwargs["input_ids"])

    model.register_forward_pre_hook(remember, with_kwargs=True)
    run_benchmarks(model, tokenizer(), ["toy_choice"], num_fewshot=0, include_path=folder, batch_size=1)
    counted = benchmark_tokens(settings, tokenizer())
    # The harness computes requests with one context once, and leaves out the last token of each.
    assert sum(ids.numel() for ids in read) <= counted <= 4 * sum(ids.numel() + 1 for ids in read)


def test_benchmarks_run_in_bf16_on_a_gpu():
    settings = EvaluationArguments(base="x", data=["x"], benchmarks=["toy_choice"])
    assert benchmark_dtype(settings, on_gpu=True) == "bfloat16"
    assert benchmark_dtype(settings, on_gpu=False) == "float32"
    settings.benchmark_dtype = "float32"
    assert benchmark_dtype(settings, on_gpu=True) == "float32"
