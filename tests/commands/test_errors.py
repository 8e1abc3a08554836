"""Which errors are mistakes of the user, reported in one line, and which are bugs, shown with their traceback."""

import errno
from pathlib import Path

import pytest
from toy import trainer as make_trainer
from transformers import TrainerCallback, TrainingArguments

from hf_sam.commands.reporting import run_command
from hf_sam.runtime.errors import MeasurementError


def error_line(capsys, program, **kwargs) -> str | None:
    """The line that a command prints about an error of its program; None if it raises the error."""
    try:
        status = run_command("command", program, **kwargs)
    except Exception:
        assert not capsys.readouterr().err.startswith("command: ")
        return None
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert lines[-1].startswith("command: ")
    return lines[-1].removeprefix("command: ")


def function_of(module: str, body: str, file: str = "made_up.py"):
    """A function without arguments as that module would define it."""
    names = {"__name__": module}
    exec(compile(f"def function():\n    {body}\n", file, "exec"), names)
    return names["function"]


@pytest.mark.parametrize(
    ("module", "body", "mistake"),
    [
        ("hf_sam.arguments", "raise ValueError('wrong')", True),
        ("hf_sam.arguments", "raise ImportError('wrong')", True),
        ("hf_sam.arguments", "raise TypeError('wrong')", False),
        ("hf_sam.arguments", "raise AssertionError('wrong')", False),
        # Of the interpreter: nobody wrote a message for a user.
        ("hf_sam.arguments", "int('x')", False),
        ("hf_sam.arguments", "a, b = (1,)", False),
        ("transformers.training_args", "raise ValueError('wrong')", True),
        ("transformers.training_args", "int('x')", False),
        ("datasets.load", "raise FileNotFoundError('wrong')", True),
        ("torch.nn.functional", "raise ValueError('wrong')", False),
        ("json.decoder", "raise ValueError('wrong')", False),
        ("users_own", "raise ValueError('wrong')", False),
        ("users_own", "open('/nowhere/at/all')", True),
    ],
)
def test_who_raises_what_decides(capsys, module, body, mistake):
    line = error_line(capsys, function_of(module, body))
    assert (line is not None) == mistake
    if mistake:
        assert line in ("wrong", "'/nowhere/at/all': No such file or directory.")


def test_where_a_script_of_the_users_own_runs_only_errors_of_hf_sam_are_reported(capsys):
    for module, mistake in (("hf_sam.arguments", True), ("transformers.training_args", False), ("users_own", False)):
        program = function_of(module, "raise ValueError('wrong')")
        assert (error_line(capsys, program, library_errors=False) is not None) == mistake
    assert error_line(capsys, function_of("users_own", "open('/nowhere/at/all')"), library_errors=False) is None


def test_errors_of_measures_and_of_many_lines_are_reported_in_one(capsys):
    names = {"__name__": "hf_sam.instruments.loss", "MeasurementError": MeasurementError}
    exec("def function():\n    raise MeasurementError('first\\n  second')", names)
    assert error_line(capsys, names["function"]) == "first second"


class Fails(TrainerCallback):
    """Runs something in the middle of training."""

    def __init__(self, function):
        self._function = function

    def on_step_end(self, args, state, control, **kwargs):
        self._function()


@pytest.mark.parametrize(
    ("module", "body", "mistake"),
    [
        # Before training the same error would be one about settings or data.
        ("transformers.data", "raise ValueError('wrong')", False),
        ("users_own", "open('/nowhere/at/all')", False),
        ("hf_sam.pretraining.documents", "raise ValueError('wrong')", True),
        ("users_own", f"raise OSError({errno.ENOSPC}, 'No space left on device', 'checkpoint')", True),
        ("users_own", f"raise PermissionError({errno.EACCES}, 'Permission denied', 'checkpoint')", True),
    ],
)
def test_within_training_the_host_has_bugs_and_the_disk_may_be_full(capsys, tmp_path, module, body, mistake):
    run = make_trainer(tmp_path, max_steps=1)
    run.add_callback(Fails(function_of(module, body)))
    assert (error_line(capsys, lambda: run.train() and 0) is not None) == mistake


def test_errors_of_the_hosts_own_settings_are_reported(capsys, tmp_path):
    wrong = {"bf16": True, "fp16": True, "use_cpu": True}
    line = error_line(capsys, lambda: TrainingArguments(output_dir=str(tmp_path), **wrong) and 0)
    assert "fp16 and bf16" in line


def test_of_several_processes_the_first_reports(capsys, monkeypatch):
    program = function_of("hf_sam", "raise ValueError('wrong')")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command("command", program) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_command("command", program) == 2
    assert capsys.readouterr().err == "command: wrong\n"


def test_asked_for_the_traceback_is_shown(monkeypatch):
    monkeypatch.setenv("HF_SAM_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        run_command("command", function_of("hf_sam", "raise ValueError('wrong')"))


def test_no_command_of_the_project_reports_errors_in_another_way():
    root = Path(__file__).parents[2]
    recipes = list((root / "recipes").glob("*.py"))
    assert recipes
    for path in recipes:
        # `hf-sam` reports the errors of its commands, and recipes run one of them.
        assert "from hf_sam.commands import main" in path.read_text(), path
    for path in (root / "hf_sam").rglob("*.py"):
        assert "def main(argv" not in path.read_text() or "commands" in path.parts, path
