"""Starts the worker on two ranks, once a strategy for all tests of it."""

import os
import subprocess
import sys
from pathlib import Path

from distributed.strategies import WORLD_SIZE

WORKER = Path(__file__).with_name("worker.py")


def launch(strategy: str, output_dir: Path, *scenarios: str, timeout: float = 400.0) -> None:
    """Run the worker for `strategy`; its results lie in `output_dir` afterwards.

    Raises:
        RuntimeError: with the end of the worker's output, if it fails or takes longer than `timeout` seconds.
    """
    command = [sys.executable, str(WORKER), strategy, str(output_dir), *scenarios]
    if strategy != "single":
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD_SIZE}"]
        command[1:1] = torchrun
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors="replace") if expired.stdout else ""
        raise RuntimeError(f"{strategy}: no end after {timeout:.0f} s.\n{output[-4000:]}") from expired
    if done.returncode != 0:
        raise RuntimeError(f"{strategy}: exit status {done.returncode}.\n{done.stdout[-6000:]}")
