"""A chain of small programs that note when they begin and end, each in a process of its own.

python toy_chain.py FOLDER NAME          # one stage
python toy_chain.py FOLDER --drive 0 1   # all of them, on these devices
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_sam.experiments.driver import run_chain
from hf_sam.experiments.stages import Chain, Stage


@dataclass
class Program:
    """A stage: its name, the stages that it needs, and Python code."""

    name: str
    needs: list[str] = field(default_factory=list)
    body: str = ""
    settings: dict = field(default_factory=dict)
    wide: bool = False
    replaceable: bool = False


def write(folder: Path, programs: list[Program]) -> None:
    (folder / "programs.json").write_text(json.dumps([asdict(program) for program in programs]))


def read(folder: Path) -> Chain:
    return Chain(
        [_stage(Program(**one)) for one in json.loads((folder / "programs.json").read_text())], folder / "work"
    )


def _stage(program: Program) -> Stage:
    def late() -> dict:
        if program.body == "unknown":
            raise ValueError("there is no checkpoint")
        return {"late": True}

    needs = tuple(program.needs)
    return Stage(program.name, program.body, program.settings, needs, program.wide, late, program.replaceable)


def command(folder: Path):
    return lambda stage: [sys.executable, __file__, str(folder), stage.name]


def drive(folder: Path, programs: list[Program] | None = None, devices=("",)) -> tuple[bool, list[str]]:
    """Run all stages from this process; whether all are finished, and what the driver said."""
    if programs is not None:
        write(folder, programs)
    said: list[str] = []
    return run_chain(read(folder), devices, command(folder), said.append), said


def notes(folder: Path) -> list[list]:
    """Name, begin, end and devices of each stage that has ended."""
    path = folder / "notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(folder: Path) -> list[str]:
    return [note[0] for note in notes(folder)]


def main(folder: Path, name: str, *devices: str) -> int:
    if name == "--drive":
        return 0 if run_chain(read(folder), devices or ("",), command(folder)) else 1

    def run_command(body: str, argv: list[str]) -> int:
        began = time.monotonic()
        with (folder / "begun").open("a") as file:
            print(json.dumps([name, os.getpid()]), file=file)
        exec(body, {"folder": folder})
        with (folder / "notes").open("a") as file:
            print(json.dumps([name, began, time.monotonic(), os.environ.get("CUDA_VISIBLE_DEVICES")]), file=file)
        return 0

    return read(folder).run(name, run_command)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
