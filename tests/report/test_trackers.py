"""Results in experiment trackers: one of our own, registered with accelerate, and TensorBoard where it is installed."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class

from hf_sam import commands
from hf_sam.evaluation import Results
from hf_sam.report.trackers import scalars
from hf_sam.statistics import forgetting


class Notebook(GeneralTracker):
    """Keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False
    told = []  # noqa: RUF012

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.told.append(("run", run_name, kwargs))

    @property
    def tracker(self):
        return None

    def start(self):
        self.told.append(("start",))

    def store_init_configuration(self, values):
        self.told.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.told.append(("log", values, step))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def notebook():
    register_tracker_class(Notebook)
    Notebook.told.clear()
    yield Notebook.told
    del LOGGER_TYPE_TO_CLASS["notebook"]


def command(shelf, output, *extra):
    argv = ["evaluate", "--base", str(shelf / "base"), "--tuned", str(shelf / "tuned1"), "--max_length", "64"]
    argv += ["--data", str(shelf / "old.jsonl"), "--quantize", "rtn3", "--sharpness", "sam", "norm"]
    return commands.main([*argv, "--output", str(output), *extra])


def test_all_numbers_are_logged(shelf, tmp_path, notebook):
    assert command(shelf, tmp_path / "run", "--report_to", "notebook") == 0
    results = Results.read(tmp_path / "run")
    assert [kind for kind, *_ in notebook] == ["run", "start", "settings", "log", "finish"]
    assert notebook[2][1]["quantize"] == "rtn3"
    _, values, step = notebook[3]
    assert step == 0
    assert values == scalars(results)
    before, after = (results.loss(name, "old") for name in ("base", "tuned1"))
    assert values["loss/old/base"] == before.loss
    assert values["forgetting/old/tuned1"] == forgetting(before, after).value
    damage = results.loss("base", "old", "rtn3").loss - before.loss
    assert values["damage/old/base/rtn3"] == pytest.approx(damage)
    assert values["sharpness/sam/base"] == results.result("sam", "base")["value"]
    # Where results are logged makes no other evaluation of it.
    assert command(shelf, tmp_path / "run") == 0


def test_unknown_and_missing_trackers_are_told_before(shelf, tmp_path, capsys):
    assert command(shelf, tmp_path / "run", "--report_to", "wandbb") == 2
    assert "--report_to wandbb must be one of aim" in capsys.readouterr().err
    assert command(shelf, tmp_path / "run", "--report_to", "clearml") == 2
    assert "--report_to clearml needs clearml. Install it: pip install clearml" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_them(shelf, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert command(shelf, tmp_path / "run", "--report_to", "tensorboard") == 0
    found = {}
    for events in {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents*")}:
        written = reading.EventAccumulator(str(events)).Reload()
        found |= {name: written.Scalars(name)[0].value for name in written.Tags()["scalars"]}
    expected = scalars(Results.read(tmp_path / "run"))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
