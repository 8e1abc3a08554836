"""Stages run once, in order, on the devices that they need, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_chain import Program, drive, names, notes, read, write

from hf_sam.experiments.stages import Chain, Stage

TOY_CHAIN = Path(__file__).parent / "toy_chain.py"


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begun(folder: Path) -> list[tuple[str, int]]:
    """Name and process of each stage that has begun."""
    path = folder / "begun"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def start(folder: Path, *argv: str) -> subprocess.Popen:
    """A driver, or a stage, in a process of its own."""
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
    program += f"import runpy, sys; sys.argv = {[str(TOY_CHAIN), str(folder), *argv]!r}\n"
    program += f"sys.path.insert(0, {str(TOY_CHAIN.parent)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def ended():
    """Processes to end, by their id, after the test."""
    processes: list[int] = []
    yield processes
    for pid in filter(is_alive, processes):
        os.kill(pid, signal.SIGKILL)


def test_each_comes_after_those_that_it_needs_and_runs_once(tmp_path):
    programs = [Program("c", ["a", "b"]), Program("b", ["a"]), Program("a")]
    done, said = drive(tmp_path, programs)
    assert done
    assert names(tmp_path) == ["a", "b", "c"]
    assert said[-1].startswith("[3/3] c took")
    assert drive(tmp_path, programs) == (True, ["3 of 3 stages are done already."])
    assert len(notes(tmp_path)) == 3


def test_stages_share_the_devices_and_wide_ones_take_all(tmp_path):
    # Ends only if two of them run side by side.
    meet = "import time\nwhile len((folder / 'begun').read_text().splitlines()) < 2: time.sleep(0.05)"
    programs = [Program(name, body=meet) for name in "abc"]
    done, _ = drive(tmp_path, [*programs, Program("all", ["a"], body=meet, wide=True)], devices=("0", "3"))
    assert done
    found = {name: (began, end, device) for name, began, end, device in notes(tmp_path)}
    assert {found["a"][2], found["b"][2]} == {"0", "3"}
    assert found["all"][2] == "0,3"
    assert found["a"][0] < found["b"][1]
    assert found["b"][0] < found["a"][1]
    for other in "abc":  # nothing beside a wide one
        assert found["all"][0] >= found[other][1] or found["all"][1] <= found[other][0]


@pytest.mark.parametrize(("wide", "threads"), [(False, "3"), (True, "6")])
def test_stages_on_the_cpu_share_its_threads(tmp_path, monkeypatch, wide, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    body = "import os; (folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])"
    drive(tmp_path, [Program("a", body=body, wide=wide)], devices=("", ""))
    assert (tmp_path / "threads").read_text() == threads


def test_what_fails_is_reported_and_leaves_the_others_running(tmp_path):
    programs = [
        Program("bad", body="import sys; sys.exit('the disk is gone')"),
        Program("after", ["bad"]),
        Program("good"),
        Program("later", ["good"]),
    ]
    done, said = drive(tmp_path, programs, devices=("", ""))
    assert not done
    assert names(tmp_path) == ["good", "later"]
    assert any("bad failed with status 1" in line and "the disk is gone" in line for line in said)
    done, said = drive(tmp_path, [Program("bad"), *programs[1:]])
    assert done
    assert said[0] == "2 of 4 stages are done already."
    assert names(tmp_path) == ["good", "later", "bad", "after"]


def test_what_needs_a_stage_that_is_run_again_is_run_again(tmp_path):
    programs = [Program("base"), Program("sft", ["base"]), Program("other"), Program("end", ["sft"])]
    drive(tmp_path, programs)
    (tmp_path / "work" / "finished" / "base.json").unlink()
    assert drive(tmp_path, programs)[0]
    assert names(tmp_path)[4:] == ["base", "sft", "end"]


def test_a_stage_whose_settings_cannot_be_completed_leaves_the_others_running(tmp_path):
    done, said = drive(tmp_path, [Program("bad", body="unknown"), Program("good")])
    assert not done
    assert names(tmp_path) == ["good"]
    assert any("bad failed with status 1" in line and "there is no checkpoint" in line for line in said)


def test_other_settings_of_what_is_done_are_refused(tmp_path):
    drive(tmp_path, [Program("a", settings={"rho": 0.05, "seed": 1})])
    with pytest.raises(ValueError, match=r"'a' was run with other settings \(rho\).*--output_dir"):
        drive(tmp_path, [Program("a", settings={"rho": 0.1, "seed": 1})])
    assert len(names(tmp_path)) == 1


def test_a_report_of_other_runs_replaces_the_one_before(tmp_path):
    """Two presets that share runs may share a folder."""
    a, b = Program("a"), Program("b")
    for runs, needs in (("a", ["a"]), ("ab", ["a", "b"]), ("ab", ["a", "b"])):
        report = Program("report", needs, settings={"runs": list(runs)}, replaceable=True)
        assert drive(tmp_path, [a, b, report] if len(needs) > 1 else [a, report])[0]
    assert names(tmp_path) == ["a", "report", "b", "report"]


def test_a_chain_that_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' needs unknown stage 'b'"):
        Chain([Stage("a", "", {}, ("b",))], tmp_path)
    with pytest.raises(ValueError, match=r"need each other: (a -> b -> a|b -> a -> b)"):
        Chain([Stage("a", "", {}, ("b",)), Stage("b", "", {}, ("a",))], tmp_path)


def test_one_stage_runs_after_those_that_it_needs_only(tmp_path):
    """As a scheduler starts them."""
    write(tmp_path, [Program("a"), Program("b", ["a"])])
    run = []
    chain = read(tmp_path)
    with pytest.raises(ValueError, match="'b' needs the stage 'a', which is not finished"):
        chain.run("b", lambda *call: run.append(call) or 0)
    with pytest.raises(ValueError, match="no stage 'c'; the stages are a, b"):
        chain.run("c", lambda *call: run.append(call) or 0)
    assert chain.run("a", lambda *call: run.append(call) or 3) == 3  # fails, so it is not finished
    for _ in range(2):
        for name in "ab":
            assert chain.run(name, lambda *call: run.append(call) or 0) == 0
    assert [Path(argv[1]).name for _, argv in run] == ["a.yaml", "a.yaml", "b.yaml"]
    assert chain.finished() == {"a", "b"}


def test_an_interrupt_ends_what_was_started(tmp_path, ended):
    """Ctrl-C in the driver, or a scheduler that ends it: no stage lives on, and none counts as done."""
    write(tmp_path, [Program("a", body="import time; time.sleep(120)")])
    for count, number in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        driver = start(tmp_path, "--drive")
        wait_for(lambda count=count: len(begun(tmp_path)) == count)
        ended += [driver.pid, begun(tmp_path)[-1][1]]
        driver.send_signal(number)
        driver.wait(timeout=40)
        assert driver.returncode != 0
        assert not is_alive(begun(tmp_path)[-1][1])
        assert not list((tmp_path / "work").glob("finished/*"))


def test_a_killed_driver_leaves_its_stages_to_the_next_one(tmp_path, ended):
    """The next driver waits for the stage that still runs, and does not start it again."""
    body = "import time\nwhile not (folder / 'go').exists(): time.sleep(0.05)"
    write(tmp_path, [Program("a", body=body), Program("b", ["a"])])
    driver = start(tmp_path, "--drive")
    wait_for(lambda: begun(tmp_path))
    ((_, stage_pid),) = begun(tmp_path)
    ended += [driver.pid, stage_pid]
    driver.kill()
    driver.wait()
    again = start(tmp_path, "--drive")
    ended.append(again.pid)
    assert again.stdout.readline() == "Waiting for another process, which runs the stage 'a'.\n"
    assert is_alive(stage_pid)
    (tmp_path / "go").touch()
    assert again.wait(timeout=60) == 0
    assert [name for name, _ in begun(tmp_path)] == ["a", "b"]
    assert again.stdout.readline() == "1 of 2 stages are done already.\n"


def test_a_killed_stage_is_run_again_by_the_same_command(tmp_path, ended):
    body = "import time\nif not (folder / 'go').exists(): time.sleep(120)"
    write(tmp_path, [Program("a", body=body), Program("b", ["a"])])
    driver = start(tmp_path, "--drive")
    wait_for(lambda: begun(tmp_path))
    ended += [driver.pid, begun(tmp_path)[0][1]]
    os.kill(begun(tmp_path)[0][1], signal.SIGKILL)
    assert driver.wait(timeout=60) == 1
    assert "a failed with status -9" in driver.stdout.read()
    (tmp_path / "go").touch()
    assert drive(tmp_path)[0]
    assert [name for name, _ in begun(tmp_path)] == ["a", "a", "b"]


def test_two_drivers_run_each_stage_once(tmp_path, ended):
    write(tmp_path, [Program("a", body="import time; time.sleep(1)"), Program("b", ["a"])])
    drivers = [start(tmp_path, "--drive") for _ in range(2)]
    ended += [driver.pid for driver in drivers]
    assert [driver.wait(timeout=90) for driver in drivers] == [0, 0]
    assert names(tmp_path) == ["a", "b"]
    assert sum("Waiting for another driver" in driver.stdout.read() for driver in drivers) == 1


def test_processes_that_a_killed_stage_forked_do_not_keep_its_lock(tmp_path, ended):
    """Such as the workers of a data loader, which may outlive it for a while."""
    body = (
        "import os, time\nif not (folder / 'go').exists():\n    child = os.fork()\n    if child == 0:\n"
        "        time.sleep(120)\n        os._exit(0)\n    (folder / 'child').write_text(str(child))\n"
        "    time.sleep(120)"
    )
    write(tmp_path, [Program("a", body=body)])
    stage = start(tmp_path, "a")
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    ended += [stage.pid, int((tmp_path / "child").read_text())]
    stage.kill()
    stage.wait()
    assert is_alive(int((tmp_path / "child").read_text()))
    (tmp_path / "go").touch()
    assert drive(tmp_path)[0]
    assert names(tmp_path) == ["a"]


def test_only_the_first_of_several_processes_holds_the_lock_and_writes_the_mark(tmp_path, monkeypatch):
    write(tmp_path, [Program("a")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    chain = read(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert chain.run("a", lambda *_: 0) == 0
    assert chain.finished() == set()
    assert not (tmp_path / "work" / "locks").exists()
    monkeypatch.setenv("RANK", "0")
    assert chain.run("a", lambda *_: 0) == 0
    assert chain.finished() == {"a"}
