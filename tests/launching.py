"""Runs commands of `hf-sam` in processes of their own, one or more ranks, and kills them where a test wants it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

TESTS = Path(__file__).parent


@dataclass
class Ended:
    """A command that has run: exit status and output of each rank."""

    status: list[int]
    output: list[str]


class Launcher:
    """Runs commands in processes of their own."""

    def __init__(self, folder: Path):
        self._folder, self._jobs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "zygote.log").open("w"),
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        )
        assert self._answer() == "ready"

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, (self._folder / "zygote.log").read_text()[-3000:]
        return json.loads(line)

    def __call__(self, command: str, argv: list[str], ranks: int = 1, strategy: str = "single", **job) -> Ended:
        self._jobs += 1
        log = str(self._folder / f"{self._jobs}-{command}.log")
        if strategy not in ("single", "ddp"):
            sys.path.append(str(TESTS / "distributed"))
            from strategies import strategy_arguments

            config = self._folder / f"{strategy}.yaml"
            config.write_text(yaml.safe_dump(strategy_arguments(strategy)))
            place = argv.index("--config") + 2
            argv = [*argv[:place], str(config), *argv[place:]]
        job |= {"command": command, "argv": list(map(str, argv)), "ranks": ranks, "strategy": strategy, "log": log}
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        status = self._answer()
        return Ended(status, [Path(f"{log}.{rank}").read_text() for rank in range(ranks)])

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)
