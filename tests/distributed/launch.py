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
    command = [str(WORKER), strategy, str(output_dir), *scenarios]
    _run(strategy, command, 1 if strategy == "single" else WORLD_SIZE, timeout)


def run_on_ranks(script: str, output_dir: Path, timeout: float = 300.0) -> None:
    """Run a script of this folder on two ranks; see [`launch`]."""
    _run(script, [str(WORKER.with_name(script)), str(output_dir)], WORLD_SIZE, timeout)


def _run(what: str, arguments: list[str], processes: int, timeout: float) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors="replace") if expired.stdout else ""
        raise RuntimeError(f"{what}: no end after {timeout:.0f} s.\n{output[-4000:]}") from expired
    if done.returncode != 0:
        raise RuntimeError(f"{what}: exit status {done.returncode}.\n{done.stdout[-6000:]}")
