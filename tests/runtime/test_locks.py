"""Locks that end with their holder."""

import os
import signal
import subprocess
import sys

from hf_sam.runtime.locks import locked

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom hf_sam.runtime.locks import locked\n"
    "with locked(Path(sys.argv[1]), 'busy'):\n    print('held', flush=True)\n    time.sleep(float(sys.argv[2]))\n"
)


def hold(path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_held_by_one_and_waited_for_by_the_others(tmp_path, capsys):
    holder = hold(tmp_path / "a" / "lock", 1)
    with locked(tmp_path / "a" / "lock", "busy"):
        assert holder.wait(timeout=20) == 0  # it has left the block, so it is about to end
    assert capsys.readouterr().out == "busy\n"
    with locked(tmp_path / "a" / "lock", "busy"):
        pass
    assert capsys.readouterr().out == ""


def test_a_killed_process_leaves_no_lock_behind(tmp_path, capsys):
    holder = hold(tmp_path / "lock", 120)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "lock", "busy"):
        pass
    assert capsys.readouterr().out == ""


def test_a_lock_is_released_after_an_error(tmp_path, capsys):
    for _ in range(2):
        try:
            with locked(tmp_path / "lock", "busy"):
                raise ValueError
        except ValueError:
            pass
    assert capsys.readouterr().out == ""
