"""`hf-sam evaluate`: the numbers of the functions, a record, a report; interrupted and resumed; refused in time."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from toy_evaluation import sharp_olmo2
from toy_trl import rows, tokenizer

from hf_sam import commands
from hf_sam.evaluation import EvaluationArguments, Results, evaluate, models, run
from hf_sam.instruments import HeldOutData, held_out_loss, hessian, hessian_spectrum, loss, noise_kl
from hf_sam.quantizers import load_quantized
from hf_sam.runtime.models import find_model
from hf_sam.statistics import forgetting

SETTINGS = ["--max_length", "64"]


def command(shelf, output, *extra, tuned=("tuned1", "tuned2", "tuned3")):
    return [
        "evaluate",
        *("--base", str(shelf / "base"), "--tuned", *(str(shelf / name) for name in tuned)),
        *("--data", str(shelf / "old.jsonl"), "--task_data", str(shelf / "task.jsonl"), "--task_column", "completion"),
        *("--output", str(output), *SETTINGS, *extra),
    ]


EVERYTHING = (
    *("--quantize", "nf4", "rtn3", "--wise_ft", "0.5", "--sharpness", "kl", "noise", "sam", "hessian"),
    *("--landscape", "line", "plane", "random", "--similarity", "--sharpness_documents", "6"),
)


@pytest.fixture(scope="module")
def done(shelf, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "AdamW"
    assert commands.main(command(shelf, output, *EVERYTHING)) == 0
    return output


@pytest.fixture(scope="module")
def record(done):
    return json.loads((done / "results.json").read_text())


def test_numbers_are_those_of_the_functions(shelf, done, record):
    results = Results.read(done)
    old = HeldOutData.from_dataset(rows("text"), tokenizer())
    base, tuned = (find_model(str(shelf / name)).load(torch.float32) for name in ("base", "tuned2"))
    before, after = held_out_loss(base, old), held_out_loss(tuned, old)
    assert results.loss("base", "old").loss == before.loss
    assert results.loss("tuned2", "old").loss == after.loss
    task = HeldOutData.from_dataset(rows("completion"), tokenizer(), column="completion")
    assert results.loss("tuned2", "task").loss == held_out_loss(tuned, task).loss
    small, made_of = load_quantized(shelf / "tuned2", "nf4")
    assert results.loss("tuned2", "old", "nf4").loss == held_out_loss(small, old).loss
    assert results.find("quantized", "tuned2", "nf4")[0]["result"]["bits"] == made_of.bits
    assert results.result("kl", "base")["value"] == noise_kl(base, old.first(6)).value
    assert results.result("hessian", "base")["trace"] == pytest.approx(
        hessian_spectrum(base, old.first(6)).trace, rel=1e-3
    )
    assert results.result("line", "tuned2")["losses"][-1] == held_out_loss(tuned, old.first(6)).loss
    assert len(results.sweep()) == 3
    assert str(forgetting(before, after)) in (done / "report.md").read_text()


def test_record_says_what_was_measured_with_what(shelf, record):
    assert record["name"] == "AdamW"
    assert record["environment"]["torch"] == version("torch")
    assert record["settings"]["seed"] == 0
    assert [model["name"] for model in record["models"]] == ["base", "tuned1", "tuned2", "tuned3"]
    assert record["models"][0]["fingerprint"] == find_model(str(shelf / "base")).fingerprint
    assert {data["name"]: data["documents"] for data in record["data"]} == {"old": 64, "task": 64}
    assert not [part for part in record["parts"] if part.get("error")]


def test_reports_show_everything_and_stand_alone(done):
    markdown, page = (done / "report.md").read_text(), (done / "report.html").read_text()
    for title in ("Held-out loss and forgetting", "Quantization", "Sharpness", "Loss landscape", "Wise-FT", "Distance"):
        assert title in markdown
        assert title in page
    pictures = re.findall(r"\]\(([^)]+\.png)\)", markdown)
    assert {"line.png", "plane.png", "noise.png", "cka.png", "random_base.png"} <= set(pictures)
    for picture in pictures:
        assert (done / picture).read_bytes().startswith(b"\x89PNG")
    # Nothing in the page is fetched from anywhere.
    assert len(re.findall(r'src="data:image/png;base64,', page)) == len(pictures)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    # Tables are whole: every line of one has as many cells.
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines() if "---" not in line}) == 1, table


def test_a_second_run_computes_nothing(shelf, done, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    before = (done / "report.md").read_text()
    monkeypatch.setattr(run.LocalModel, "load", fail)
    monkeypatch.setattr(models, "load_source_quantized", fail)
    assert commands.main(command(shelf, done, *EVERYTHING)) == 0
    after = (done / "report.md").read_text()
    began = before.splitlines().index("## Setup") + 2  # the time and the command
    assert [line for i, line in enumerate(before.splitlines()) if i != began] == [
        line for i, line in enumerate(after.splitlines()) if i != began
    ]


def test_an_interrupted_evaluation_goes_on(shelf, tmp_path, monkeypatch):
    """Ctrl-C in the middle: the parts that were through are not computed again, and the results are the same."""
    whole = evaluate(arguments(shelf, tmp_path / "whole"))
    real, calls = loss.held_out_loss, []

    def interrupted(model, data, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, data, **kwargs)

    monkeypatch.setattr(loss, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments(shelf, tmp_path / "part"))
    assert not (tmp_path / "part" / "results.json").exists()
    assert len(list((tmp_path / "part" / "parts").glob("*.json"))) == 3
    resumed = evaluate(arguments(shelf, tmp_path / "part"))
    # 3 models, 2 sets: 6 losses in all, of which 3 were there.
    assert len(calls) == 4 + 3
    assert [part["result"] for part in resumed["parts"]] == [part["result"] for part in whole["parts"]]


@pytest.mark.parametrize("content", ["", '{"part": "loss", "resu', "[]", "null", "\x00\x00"])
def test_a_truncated_part_is_measured_again(shelf, tmp_path, content):
    """After a crash of the machine or a full disk: the file is there, and what it holds is not a result."""
    whole = evaluate(arguments(shelf, tmp_path))
    part, *others = sorted((tmp_path / "parts").glob("*.json"))
    part.write_text(content)
    before = {other: other.stat().st_mtime_ns for other in others}
    again = evaluate(arguments(shelf, tmp_path))
    assert [part["result"] for part in again["parts"]] == [part["result"] for part in whole["parts"]]
    assert json.loads(part.read_text())["result"] is not None
    assert {other: other.stat().st_mtime_ns for other in others} == before


def arguments(shelf, output, **overrides):
    settings = {
        "base": str(shelf / "base"),
        "tuned": [str(shelf / "tuned1"), str(shelf / "tuned2")],
        "data": [str(shelf / "old.jsonl")],
        "task_data": [str(shelf / "task.jsonl")],
        "task_column": "completion",
        "output": str(output),
        "max_length": 64,
        **overrides,
    }
    return EvaluationArguments(**settings)


def test_what_changed_is_measured_again(shelf, tmp_path):
    shutil.copytree(shelf / "tuned1", tmp_path / "tuned1")
    settings = {"tuned": [str(tmp_path / "tuned1")], "task_data": []}
    first = evaluate(arguments(shelf, tmp_path / "out", **settings))
    sharp_olmo2(seed=3).save_pretrained(tmp_path / "tuned1")
    settings["overwrite"] = True
    second = evaluate(arguments(shelf, tmp_path / "out", **settings))
    assert first["parts"][0]["result"]["loss"] == second["parts"][0]["result"]["loss"]
    assert first["parts"][1]["result"]["loss"] != second["parts"][1]["result"]["loss"]
    fewer = evaluate(arguments(shelf, tmp_path / "out", max_documents=10, **settings))
    assert fewer["parts"][0]["result"]["tokens"] < first["parts"][0]["result"]["tokens"]
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 5


def test_a_measure_that_fails_does_not_take_the_others_with_it(shelf, tmp_path, monkeypatch, capsys):
    from hf_sam.runtime.errors import MeasurementError

    def fail(*args, **kwargs):
        raise MeasurementError("no eigenvalue was found")

    monkeypatch.setattr(hessian, "hessian_spectrum", fail)
    flags = ("--sharpness", "hessian", "sam", "--sharpness_documents", "2")
    assert commands.main(command(shelf, tmp_path, *flags, tuned=["tuned1"])) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "2 of 8 measures failed, first hessian of base: no eigenvalue was found" in line
    report = (tmp_path / "report.md").read_text()
    assert "no eigenvalue was found" in report
    assert "missing" in report
    monkeypatch.undo()
    # It is tried again next time.
    assert commands.main(command(shelf, tmp_path, *flags, tuned=["tuned1"])) == 0
    assert "missing" not in (tmp_path / "report.md").read_text()


def test_adapters_are_evaluated_like_models(shelf, tmp_path):
    assert commands.main(command(shelf, tmp_path, "--quantize", "nf4", tuned=["adapter"])) == 0
    results = Results.read(tmp_path)
    assert results.loss("adapter", "old").loss != results.loss("base", "old").loss
    assert results.find("quantized", "adapter", "nf4")[0]["result"]["layers"] == 14


def test_flags_may_stand_in_a_file(shelf, tmp_path):
    config = {"base": str(shelf / "base"), "data": str(shelf / "old.jsonl"), "max_length": 64, "max_documents": 5}
    (tmp_path / "config.yaml").write_text(json.dumps({**config, "output": str(tmp_path / "out")}))
    assert commands.main(["evaluate", "--config", str(tmp_path / "config.yaml"), "--max_documents", "7"]) == 0
    assert Results.read(tmp_path / "out").record["data"][0]["documents"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "/nowhere"}, "There is no folder '/nowhere'"),
        ({"base": ""}, "needs --base"),
        ({"data": []}, "needs --data"),
        ({"data": ["/nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"data_column": "body"}, "no column 'body'.*--data_column"),
        ({"task_data": ["OLD"], "task_column": "text"}, "both have a 'old'.*NAME=PATH"),
        ({"max_length": 65}, "takes 64 tokens at most"),
        ({"quantize": ["nf5"]}, "no quantization scheme 'nf5'"),
        ({"sharpness": ["flat"]}, "--sharpness flat must be one of kl"),
        ({"sharpness": ["kl"], "dtype": "bfloat16"}, "--dtype float32"),
        ({"wise_ft": [1.5]}, "from 0 .* to 1"),
        ({"tuned": [], "similarity": True}, "--similarity .* give --tuned"),
        ({"tuned": ["TUNED"], "landscape": ["plane"]}, "--landscape plane needs two tuned models"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"benchmarks": ["arc_easy"], "task_folder": "/nowhere"}, "no folder '/nowhere'"),
        ({"tuned": ["TUNED", "TUNED", "other=TUNED"], "data": ["OLD", "OLD2=OLD"], "dtype": "int8"}, "--dtype int8"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(shelf, tmp_path, monkeypatch, capsys, change, message):
    def fail(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(run.LocalModel, "load", fail)
    names = {"OLD": str(shelf / "old.jsonl"), "TUNED": str(shelf / "tuned1")}
    change = {
        key: [re.sub("OLD$|TUNED$", lambda m: names[m[0]], v) if isinstance(v, str) else v for v in value]
        if isinstance(value, list)
        else value
        for key, value in change.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(arguments(shelf, tmp_path / "out", **change))
    assert not list((tmp_path / "out").glob("parts/*.json"))


def test_other_vocabularies_and_full_disks_are_told_before(shelf, tmp_path, monkeypatch, capsys):
    shutil.copytree(shelf / "tuned1", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    path.write_text(json.dumps(content))
    argv = command(shelf, tmp_path / "out", tuned=["tuned1"])
    argv[argv.index(str(shelf / "tuned1"))] = str(tmp_path / "other")
    assert commands.main(argv) == 2
    assert "tokenizers of the base and of 'other' differ: 2 of 64" in capsys.readouterr().err
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert commands.main(command(shelf, tmp_path / "out")) == 2
    assert "No disk space: an evaluation in" in capsys.readouterr().err


def test_models_that_do_not_belong_together_are_told_before(shelf, tmp_path):
    sharp_olmo2(vocab_size=80).save_pretrained(tmp_path / "resized")
    tokenizer().save_pretrained(tmp_path / "resized")
    resized = {"tuned": [str(tmp_path / "resized")]}
    for compared in ({"similarity": True}, {"wise_ft": [0.5]}, {"landscape": ["line"]}):
        with pytest.raises(
            ValueError, match=r"do not have the same weights: '\S+' has shape \(64, 64\) in one and \(80, 64\)"
        ):
            evaluate(arguments(shelf, tmp_path / "out", **resized, **compared))
    with pytest.raises(
        ValueError, match=r"adapter 'adapter' belongs to .*base', whose weights are not those of --base"
    ):
        evaluate(arguments(shelf, tmp_path / "out", base=str(shelf / "tuned1"), tuned=[str(shelf / "adapter")]))
    # Without a comparison of weights, another size does no harm.
    assert evaluate(arguments(shelf, tmp_path / "out", **resized))["parts"][-1]["result"]["loss"] > 0


def test_checkpoints_that_lack_weights_are_an_error(shelf, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(shelf / "tuned1", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*'model.layers.1.mlp.up_proj.weight'"):
        find_model(str(tmp_path / "broken")).load(torch.float32)
    with pytest.raises(ValueError, match="lacks 1 of the weights"):
        load_quantized(tmp_path / "broken", "nf4")


def test_chats_with_new_tokens_are_measured_where_they_can_be_read(shelf, tmp_path):
    """The base has neither the template nor the markers of the fine-tuning."""
    shutil.copytree(shelf / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    model, words = sharp_olmo2(), tokenizer()
    words.add_tokens(["<|user|>", "<|assistant|>"])
    words.chat_template = words.chat_template.replace("<user>", "<|user|>").replace("<assistant>", "<|assistant|>")
    model.resize_token_embeddings(66)
    model.save_pretrained(tmp_path / "chat")
    words.save_pretrained(tmp_path / "chat")
    rows("chat").to_json(tmp_path / "chats.jsonl")
    settings = {"base": str(tmp_path / "base"), "tuned": [str(tmp_path / "chat")]}
    data = {"task_data": [str(tmp_path / "chats.jsonl")], "task_column": "messages", "output": str(tmp_path / "out")}
    assert commands.main(_flags({**settings, "data": [str(shelf / "old.jsonl")], "max_length": 64, **data})) == 0
    results = Results.read(tmp_path / "out")
    expected = HeldOutData.from_dataset(rows("chat"), words, column="messages")
    assert results.loss("chat", "chats").loss == held_out_loss(model, expected).loss
    assert not results.readable("base", "chats")
    assert "cannot read its tokens" in (tmp_path / "out" / "report.md").read_text()


def _flags(settings):
    flags = ["evaluate"]
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def test_help_and_missing_packages(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        commands.main(["evaluate", "--help"])
    assert "--quantize" in capsys.readouterr().out
    real = commands.importlib.util.find_spec
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None if name == "scipy" else real(name))
    assert commands.main(["evaluate", "--base", "x"]) == 2
    assert "pip install 'hf-sam[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(shelf, tmp_path):
    """`accelerate launch` underneath; each process computes half of the batches."""
    flags = ("--quantize", "nf4", "rtn3", "--wise_ft", "0.5", "--sharpness", "kl", "sam")
    flags = (*flags, "--similarity", "hidden_states", "weights")
    assert commands.main(command(shelf, tmp_path / "one", *flags, tuned=["tuned1"])) == 0
    launched = command(shelf, tmp_path / "two", *flags, "--multi_gpu", "--num_processes", "2", tuned=["tuned1"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_sam", *launched], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("report.html") == 1  # the first process writes
    one, two = (Results.read(tmp_path / name) for name in ("one", "two"))
    assert two.record["environment"]["processes"] == 2
    for mine, theirs in zip(two.record["parts"], one.record["parts"], strict=True):
        assert [mine[key] for key in ("part", "model", "variant", "data")] == [
            theirs[key] for key in ("part", "model", "variant", "data")
        ]
        for key, value in theirs["result"].items():
            if isinstance(value, float):
                # Sums in another order; SAM sharpness is a difference of two losses.
                assert mine["result"][key] == pytest.approx(value, rel=1e-4 if mine["part"] == "sam" else 1e-7), key


@pytest.mark.slow
def test_what_only_the_first_process_finds_out_is_told_once(shelf, tmp_path):
    """The others would wait for it, and fail with a traceback of their own."""
    (tmp_path / "file").write_text("in the way")
    argv = command(shelf, tmp_path / "file" / "out", "--multi_gpu", "--num_processes", "2", tuned=["tuned1"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_sam", *argv], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("hf-sam evaluate: ")] == [
        done.stderr.splitlines()[-1]
    ]
    assert "file is a file. Choose another output folder" in done.stderr
