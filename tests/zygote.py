"""Runs commands of `hf-sam` as a launcher would, one process a rank, without importing everything anew for each.

A process that has imported all that the commands need, and done nothing with it, forks the ranks. Jobs and answers are
lines of JSON. A job that names a file is killed (SIGKILL, all ranks) as soon as that file exists.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from hf_sam import commands

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]


def rank_of_job(job: dict, rank: int, port: int) -> None:
    """Become one rank of a job; never returns."""
    os.setpgrp()
    with open(job["log"] + f".{rank}", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    world = job["ranks"]
    os.environ.update(job.get("env", {}))
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    status = 1
    try:
        sys.argv = ["hf-sam", job["command"], *job["argv"]]
        if job.get("strategy") == "fsdp2":
            shard_on_the_cpu()
        status = commands.main(sys.argv[1:])
        assert not torch.distributed.is_initialized(), "a process group that is alive at exit may abort its process"
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def shard_on_the_cpu() -> None:
    """Accelerate shards with FSDP2 only where its state names an accelerator."""
    import transformers
    from strategies import allow_fsdp_on_cpu

    create = transformers.Trainer.create_accelerator_and_postprocess

    def allowed(self):
        allow_fsdp_on_cpu("fsdp2", self.args)
        create(self)
        assert self.is_fsdp_enabled

    transformers.Trainer.create_accelerator_and_postprocess = allowed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(job: dict) -> list[int]:
    """Exit status of each rank; -9 for one that was killed."""
    port = free_port()
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            rank_of_job(job, rank, port)
        children.append(child)
    ended: dict[int, int] = {}
    deadline = time.time() + job.get("limit", 240)
    while len(ended) < len(children):
        for child in children:
            if child not in ended:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ended[child] = os.waitstatus_to_exitcode(status)
        kill = job.get("kill_at") and Path(job["kill_at"]).exists()
        # A rank whose partner failed would wait for it.
        failed = any(status != 0 for status in ended.values())
        if kill or failed or time.time() > deadline:
            for child in children:
                if child not in ended:
                    os.killpg(os.getpgid(child), signal.SIGKILL)
        time.sleep(0.001)
    return [ended[child] for child in children]


def main() -> None:
    import deepspeed  # noqa: F401
    import transformers.integrations  # noqa: F401
    from accelerate import Accelerator  # noqa: F401

    import hf_sam.commands.compare
    import hf_sam.commands.pretrain
    import hf_sam.commands.sweep  # noqa: F401

    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
