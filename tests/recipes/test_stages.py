"""Stages run once each, in their order, side by side, and go on after whatever stopped them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import Stage, Stages, python


def stage(folder: Path, name: str, *needs: str, body: str = "", settings: dict | None = None, wide=False) -> Stage:
    """A stage that notes when it began and ended, and on which devices."""
    program = (
        "import json, os, sys, time\n"
        "began = time.monotonic()\n"
        f"{body}\n"
        f"open({str(folder / 'notes')!r}, 'a').write(json.dumps([{name!r}, began, time.monotonic(), "
        "os.environ.get('CUDA_VISIBLE_DEVICES')]) + '\\n')\n"
    )
    return Stage(name, lambda: [sys.executable, "-c", program], settings or {"name": name}, needs, wide)


def notes(folder: Path) -> list[list]:
    path = folder / "notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(folder, stages, devices=("",)) -> tuple[bool, list[str]]:
    said = []
    return Stages(stages, folder / "work", devices, said.append).run(), said


def test_each_comes_after_those_that_it_needs_and_runs_once(tmp_path):
    stages = [stage(tmp_path, "c", "a", "b"), stage(tmp_path, "b", "a"), stage(tmp_path, "a")]
    done, said = run(tmp_path, stages)
    assert done
    assert [note[0] for note in notes(tmp_path)] == ["a", "b", "c"]
    assert said[-1].startswith("[3/3] c took")
    assert run(tmp_path, stages) == (True, ["3 of 3 stages are done already."])
    assert len(notes(tmp_path)) == 3


def test_stages_share_the_devices_and_wide_ones_take_all(tmp_path):
    pause = "time.sleep(0.4)"
    stages = [stage(tmp_path, name, body=pause) for name in "abc"]
    stages += [stage(tmp_path, "all", "a", body=pause, wide=True)]
    done, _ = run(tmp_path, stages, devices=("0", "3"))
    assert done
    found = {name: (began, ended, device) for name, began, ended, device in notes(tmp_path)}
    assert {found["a"][2], found["b"][2]} == {"0", "3"}
    assert found["all"][2] == "0,3"
    assert found["a"][0] < found["b"][1]  # side by side
    assert found["b"][0] < found["a"][1]
    for other in "abc":  # nothing beside a wide one
        assert found["all"][0] >= found[other][1] or found["all"][1] <= found[other][0]


def test_what_fails_is_told_and_leaves_the_others_running(tmp_path):
    stages = [
        stage(tmp_path, "bad", body="sys.exit('the disk is gone')"),
        stage(tmp_path, "after", "bad"),
        stage(tmp_path, "good", body="time.sleep(0.3)"),
        stage(tmp_path, "later", "good"),
    ]
    done, said = run(tmp_path, stages, devices=("", ""))
    assert not done
    assert [note[0] for note in notes(tmp_path)] == ["good", "later"]
    assert any("bad failed with status 1" in line and "the disk is gone" in line for line in said)
    mended = [stage(tmp_path, "bad"), *stages[1:]]
    done, said = run(tmp_path, mended)
    assert done
    assert said[0] == "2 of 4 stages are done already."
    assert [note[0] for note in notes(tmp_path)] == ["good", "later", "bad", "after"]


def test_what_needs_a_stage_that_is_run_again_is_run_again(tmp_path):
    needs = {"base": [], "sft": ["base"], "other": [], "end": ["sft"]}
    stages = [stage(tmp_path, name, *wanted) for name, wanted in needs.items()]
    run(tmp_path, stages)
    Stages(stages, tmp_path / "work").mark(stages[0]).unlink()
    assert run(tmp_path, stages)[0]
    assert [note[0] for note in notes(tmp_path)][4:] == ["base", "sft", "end"]


def test_a_stage_whose_command_cannot_be_made_leaves_the_others_running(tmp_path):
    def command():
        raise ValueError("there is no checkpoint")

    stages = [Stage("bad", command, {}), stage(tmp_path, "good")]
    done, said = run(tmp_path, stages)
    assert not done
    assert [note[0] for note in notes(tmp_path)] == ["good"]
    assert "bad cannot be started: there is no checkpoint" in said


def test_other_settings_of_what_is_done_are_refused(tmp_path):
    run(tmp_path, [stage(tmp_path, "a", settings={"rho": 0.05, "seed": 1})])
    with pytest.raises(ValueError, match=r"'a' was run with other settings \(rho\).*--output_dir"):
        run(tmp_path, [stage(tmp_path, "a", settings={"rho": 0.1, "seed": 1})])


def test_a_stage_that_needs_what_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' needs 'b', which there is not"):
        Stages([stage(tmp_path, "a", "b")], tmp_path)


def start_a_long_stage(folder: Path) -> tuple[subprocess.Popen, int]:
    """A driver in a process of its own, and the process of its stage."""
    pid = folder / "pid"
    program = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2] / 'recipes')!r}]\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from pathlib import Path\nfrom test_stages import run, stage\n"
        f"folder = Path({str(folder)!r})\n"
        f"run(folder, [stage(folder, 'a', body=\"open(r'{pid}', 'w').write(str(os.getpid())); time.sleep(60)\")])\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return driver, int(pid.read_text())


def test_an_interrupt_ends_what_was_started(tmp_path):
    """Ctrl-C in the driver: no stage lives on, and none counts as done."""
    driver, stage_pid = start_a_long_stage(tmp_path)
    driver.send_signal(signal.SIGINT)
    driver.wait(timeout=40)
    with pytest.raises(ProcessLookupError):
        os.kill(stage_pid, 0)
    assert not list((tmp_path / "work").glob("done/*"))


def test_nobody_works_where_a_stage_of_a_driver_that_was_killed_still_does(tmp_path):
    driver, stage_pid = start_a_long_stage(tmp_path)
    with pytest.raises(ValueError, match="is still at work in"):
        run(tmp_path, [stage(tmp_path, "a")])
    driver.kill()
    driver.wait()
    with pytest.raises(ValueError, match="is still at work in"):
        run(tmp_path, [stage(tmp_path, "a")])
    os.kill(stage_pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{stage_pid}").exists() and "Z" not in Path(f"/proc/{stage_pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(tmp_path, [stage(tmp_path, "a")])[0]


def test_a_stage_that_fails_leaves_one_whose_name_begins_with_its_own(tmp_path):
    stages = [
        stage(tmp_path, "sft/adamw", body="time.sleep(0.3); sys.exit(1)"),
        stage(tmp_path, "sft/adamw-shortened", body="time.sleep(1.5)"),
    ]
    assert not run(tmp_path, stages, devices=("", ""))[0]
    assert [note[0] for note in notes(tmp_path)] == ["sft/adamw-shortened"]


def test_what_a_launcher_started_ends_with_its_stage_when_that_fails(tmp_path):
    """As torch's elastic launcher does it: in a session of its own, without the files of its parent."""
    pid = tmp_path / "pid"
    child = "import time; time.sleep(120)"
    body = (
        "import subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "os._exit(1)"
    )
    done, _ = run(tmp_path, [stage(tmp_path, "launcher", body=body)])
    assert not done
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(tmp_path, [stage(tmp_path, "launcher")])[0]


def test_recipes_are_launched_on_several_devices():
    one = python(Path("recipe.py"), Path("config.yaml"))
    assert one == [sys.executable, "recipe.py", "--config", "config.yaml"]
    many = python(Path("recipe.py"), Path("config.yaml"), processes=8)
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(many[4:])
    assert (parsed.num_processes, parsed.multi_gpu, parsed.training_script) == (8, True, "recipe.py")
    assert parsed.training_script_args == ["--config", "config.yaml"]
