"""Processes of a launcher that is killed end, too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import json, os, sys, time
from pathlib import Path
from hf_sam.runtime.processes import end_with_launcher
if sys.argv[2] == "yes":
    end_with_launcher()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(120)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux sends the signal")
@pytest.mark.parametrize("ends", ["yes", "no"])
def test_ranks_of_a_killed_launcher_end_with_it(tmp_path, ends):
    """Without the call they live on, which is why it is there."""
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    process = subprocess.Popen([*launcher, str(tmp_path / "rank.py"), str(tmp_path), ends], stderr=subprocess.DEVNULL)
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
        assert all(map(is_alive, pids))
        process.kill()
        process.wait()
        if ends == "yes":
            while any(map(is_alive, pids)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        else:
            time.sleep(2)
            assert all(map(is_alive, pids))
    finally:
        for pid in filter(is_alive, [process.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
