"""Evaluations in the folder of another one: gone on with, made larger, or refused."""

import json
import shutil

import pytest
from toy_evaluation import sharp_olmo2
from toy_trl import tokenizer

from hf_sam import commands
from hf_sam.evaluation import EvaluationArguments, Results, evaluate, run
from hf_sam.instruments import loss


def arguments(shelf, output, **overrides):
    settings = {
        "base": str(shelf / "base"),
        "tuned": [str(shelf / "tuned1")],
        "data": [str(shelf / "old.jsonl")],
        "output": str(output),
        "max_length": 64,
        "max_documents": 4,
        "quantize": ["rtn3"],
        "sharpness": ["sam"],
        "sharpness_documents": 2,
        **overrides,
    }
    return EvaluationArguments(**settings)


@pytest.fixture(scope="module")
def finished(shelf, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "AdamW"
    evaluate(arguments(shelf, output))
    return output


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished evaluation, under its name."""
    shutil.copytree(finished, tmp_path / "AdamW")
    return tmp_path / "AdamW"


def measured(folder) -> set[tuple]:
    """The parts in the record of an evaluation."""
    return {key(part) for part in Results.read(folder).record["parts"]}


def key(part) -> tuple:
    return part["part"], part["model"], part["variant"], part["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "{shelf}/tuned2"}, "its base is 'base', not 'tuned2'"),
        ({"base": "base={shelf}/tuned2"}, "its model 'base' had other weights"),
        ({"tuned": ["{shelf}/tuned2"]}, "its model 'tuned1' is left out"),
        ({"tuned": []}, "its model 'tuned1' is left out"),
        ({"tuned": ["tuned1={shelf}/tuned2"]}, "its model 'tuned1' had other weights"),
        ({"data": ["{shelf}/task.jsonl"], "data_column": "completion"}, "its data 'old' is left out"),
        ({"max_documents": 3}, "its data 'old' had other tokens"),
        ({"data": ["first={shelf}/old.txt", "{shelf}/old.jsonl"]}, "its first old data is 'old', not 'first'"),
        ({"quantize": ["rtn4"]}, "--quantize rtn3 is left out"),
        ({"sharpness": []}, "--sharpness sam is left out"),
        ({"sam_rho": 0.1}, "it has --sam_rho 0.05, not 0.1"),
        ({"sharpness_documents": 3}, "it has --sharpness_documents 2, not 3"),
        ({"dtype": "bfloat16", "sharpness": []}, "it has --dtype float32, not bfloat16"),
        ({"name": "SAM"}, "its name is 'AdamW', not 'SAM'"),
    ],
)
def test_another_evaluation_is_refused_before_anything_is_measured(shelf, finished, monkeypatch, change, message):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run.LocalModel, "load", fail)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    def placed(value):
        if isinstance(value, list):
            return [placed(one) for one in value]
        return value.format(shelf=shelf) if isinstance(value, str) else value

    with pytest.raises(ValueError, match="holds another evaluation") as caught:
        evaluate(arguments(shelf, finished, **{name: placed(value) for name, value in change.items()}))
    assert message in str(caught.value)
    assert str(finished) in str(caught.value)
    assert "Choose another --output, or replace it with --overwrite" in str(caught.value)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_the_command_tells_it_in_a_line_and_overwrite_replaces(shelf, folder, capsys):
    argv = ["--base", shelf / "base", "--data", shelf / "old.jsonl", "--max_length", "64", "--max_documents", "4"]
    argv = ["evaluate", *map(str, argv), "--output", str(folder)]
    assert commands.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-sam evaluate: {str(folder)!r} holds another evaluation (its model 'tuned1' is left out")
    assert len(measured(folder)) == 8
    assert commands.main([*argv, "--overwrite"]) == 0
    assert measured(folder) == {("loss", "base", "", "old")}


def test_the_same_again_and_more_of_it_measure_only_what_is_missing(shelf, folder, monkeypatch):
    real, calls = loss.held_out_loss, []

    def counted(model, data, **kwargs):
        calls.append(1)
        return real(model, data, **kwargs)

    monkeypatch.setattr(loss, "held_out_loss", counted)
    before = measured(folder)
    evaluate(arguments(shelf, folder))
    assert not calls
    # What no number depends on, and settings of measures that were not asked for.
    evaluate(arguments(shelf, folder, batch_size=2, num_fewshot=1))
    assert not calls
    more = {"tuned": [str(shelf / "tuned1"), str(shelf / "tuned2")], "quantize": ["rtn3", "rtn4"]}
    evaluate(arguments(shelf, folder, **more))
    # tuned2 as it is and in 3 bits, and all three in 4 bits.
    assert len(calls) == 5
    assert before < measured(folder)


def test_an_interrupted_evaluation_may_become_another(shelf, folder):
    (folder / "results.json").unlink()
    evaluate(arguments(shelf, folder, tuned=[], quantize=[], sharpness=[]))
    assert measured(folder) == {("loss", "base", "", "old")}


def test_a_record_of_something_else_is_not_replaced(shelf, folder):
    (folder / "results.json").write_text('{"accuracy": 1.0}')
    with pytest.raises(ValueError, match=r"a results\.json that is not a record of an evaluation"):
        evaluate(arguments(shelf, folder))
    assert json.loads((folder / "results.json").read_text()) == {"accuracy": 1.0}
    evaluate(arguments(shelf, folder, overwrite=True))
    assert len(measured(folder)) == 8


def test_results_of_an_instrument_that_is_not_registered_are_not_dropped(shelf, folder):
    record = json.loads((folder / "results.json").read_text())
    record["settings"] |= {"extremes": ["largest"], "weight_power": 2.0}
    (folder / "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds another evaluation \(--extremes largest is left out\)"):
        evaluate(arguments(shelf, folder))


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """Models whose training went wrong: weights that are no numbers, and finite ones that overflow."""
    folder = tmp_path_factory.mktemp("diverged")
    model = sharp_olmo2()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    save(model, folder / "nan")
    model = sharp_olmo2()
    model.model.norm.weight.data.fill_(3e38)
    save(model, folder / "overflow")
    return folder


EVERYTHING = {
    "quantize": ["nf4", "rtn3"],
    "sharpness": ["kl", "sam"],
    "wise_ft": [0.5],
    "landscape": ["line", "plane"],
    "similarity": True,
}


def test_a_diverged_model_does_not_take_the_results_of_others_with_it(shelf, diverged, tmp_path, capsys):
    tuned = [str(diverged / "nan"), str(shelf / "tuned1"), str(diverged / "overflow")]
    flags = {**EVERYTHING, "tuned": tuned, "task_data": [f"task={shelf / 'old.txt'}"]}
    settings = arguments(shelf, tmp_path / "out", **flags)
    argv = []
    for name, value in settings.to_dict().items():
        if value not in ("", [], False):
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    assert commands.main(["evaluate", *argv]) == 1
    err = capsys.readouterr().err
    assert "measures failed, first loss of nan: The weights of 'nan' are not finite numbers, first in" in err
    assert "Traceback" not in err
    alone = evaluate(arguments(shelf, tmp_path / "alone", **{**flags, "tuned": [tuned[1]], "landscape": ["line"]}))
    parts = {key(part): part for part in Results.read(tmp_path / "out").record["parts"]}
    for part in alone["parts"]:
        assert parts[key(part)]["result"] == part["result"]
    for (kind, model, variant, _), part in parts.items():
        if model == "nan" or kind == "plane":
            assert part["result"] is None, (kind, model, variant)
            assert "not finite numbers, first in 'model.layers.1.mlp.up_proj.weight'" in part["error"]
        elif model == "overflow" and "wise-ft" not in variant:
            assert part["result"] is None, (kind, variant)
            assert "logits are not finite" in part["error"]
    for name in ("report.md", "report.html"):
        report = (tmp_path / "out" / name).read_text()
        assert "missing" in report
        assert "its training diverged" in report
    # The sweep is that of the models which can be measured.
    results = Results.read(tmp_path / "out")
    assert [point.name for point in results.sweep()] == ["tuned1"]
    assert commands.main(["report", str(tmp_path / "out")]) == 0


def test_comparisons_and_a_diverged_base(shelf, diverged, tmp_path):
    quick = {"quantize": ["rtn3"], "sharpness": ["sam"], "task_data": [f"task={shelf / 'old.txt'}"]}
    for name, base in (("good", shelf / "base"), ("bad", diverged / "nan")):
        record = evaluate(arguments(shelf, tmp_path / name, base=str(base), **quick))
        assert bool([part for part in record["parts"] if part.get("error")]) == (name == "bad")
    assert Results(record).loss("tuned1", "old") is not None
    for order in (("good", "bad"), ("bad", "good")):
        folders = [str(tmp_path / name) for name in order]
        assert commands.main(["report", *folders, "--budgets", "1", "2", "--output", str(tmp_path / "comparison")]) == 0
        assert "missing" in (tmp_path / "comparison" / "report.md").read_text()
    assert commands.main(["report", str(tmp_path / "bad")]) == 0


def test_benchmarks_of_a_model_whose_losses_failed_are_not_run(shelf, diverged, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    question = {"question": "w1 w2", "choices": ["w3", "w4"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for _ in range(2)))
    settings = {"benchmarks": ["own_task"], "task_folder": str(tmp_path / "tasks"), "num_fewshot": 0}
    settings |= {"quantize": [], "sharpness": [], "tuned": [str(diverged / "overflow")]}
    record = evaluate(arguments(shelf, tmp_path / "out", **settings))
    benchmarks = {part["model"]: part for part in record["parts"] if part["part"] == "benchmarks"}
    assert benchmarks["base"]["result"]["own_task"]
    assert benchmarks["overflow"]["result"] is None
    assert "logits are not finite" in benchmarks["overflow"]["error"]
    # Another task under the same name is another evaluation.
    task = tmp_path / "tasks" / "own.yaml"
    task.write_text(task.read_text().replace("{{question}}", "{{question}} w5"))
    with pytest.raises(ValueError, match="task folder of its benchmarks is another one"):
        evaluate(arguments(shelf, tmp_path / "out", **settings))
