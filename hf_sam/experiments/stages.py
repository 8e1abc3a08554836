"""The stages of an experiment: their order, which of them are finished, and running one.

A stage is run by the process that holds its lock. The process looks whether the stage is finished, runs it, and writes
a mark. So the stage runs once, whoever starts it: the driver ([`run_chain`]), a second driver after the first was
killed, or a scheduler.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import yaml

from ..runtime.disk import read_json, write_json
from ..runtime.distributed import launched_world_size
from ..runtime.locks import locked


@dataclass(frozen=True)
class Stage:
    """A sub-command of `hf-sam` with its settings.

    Attributes:
        name (`str`): name of the stage, of its log and of its config file.
        command (`str`): name of the sub-command.
        settings (`dict`): its flags, as in a config file. If they change, a finished stage is refused, or run again.
        needs (`tuple[str, ...]`): names of the stages that must be finished before.
        wide (`bool`): whether it uses all devices of the machine.
        late_settings (`Callable[[], dict]`): more flags, which are known when the stages in `needs` are finished.
        replaceable (`bool`): whether it is run again with other settings, because it overwrites nothing but its own
            report.
    """

    name: str
    command: str
    settings: dict
    needs: tuple[str, ...] = ()
    wide: bool = False
    late_settings: Callable[[], dict] = dict
    replaceable: bool = False


class Chain:
    """The stages of an experiment and the folder that records which of them are finished.

    Args:
        stages (`Sequence[Stage]`): in any order.
        folder (`Path`): output folder of the experiment; marks, locks, logs and config files are in it.

    Raises:
        ValueError: if a stage needs an unknown one, or itself, or two of them have the same files.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path):
        by_name = {stage.name: stage for stage in stages}
        for stage in stages:
            if unknown := [name for name in stage.needs if name not in by_name]:
                raise ValueError(f"The stage {stage.name!r} needs unknown stage {unknown[0]!r}.")
        try:
            order = list(TopologicalSorter({stage.name: stage.needs for stage in stages}).static_order())
        except CycleError as error:
            raise ValueError(f"Stages need each other: {' -> '.join(error.args[1])}.") from error
        self.stages = {name: by_name[name] for name in order}
        self.folder = folder
        files: dict[Path, str] = {}
        for name, stage in self.stages.items():
            if (other := files.setdefault(self.file("finished", stage, ".json"), name)) != name:
                raise ValueError(f"The stages {other!r} and {name!r} have the same files. Rename one of their runs.")

    def __getitem__(self, name: str) -> Stage:
        """The stage with a name.

        Raises:
            ValueError: if there is none.
        """
        if name not in self.stages:
            raise ValueError(f"There is no stage {name!r}; the stages are {', '.join(self.stages)}.")
        return self.stages[name]

    def file(self, kind: str, stage: Stage, suffix: str) -> Path:
        """A file of a stage; `kind` is the folder: finished, locks, logs or configs."""
        return self.folder / kind / f"{stage.name.replace('/', '-')}{suffix}"

    @contextlib.contextmanager
    def lock(self, stage: Stage) -> Iterator[None]:
        """Hold the lock of a stage; waits while another process runs the stage."""
        busy = f"Waiting for another process, which runs the stage {stage.name!r}."
        with locked(self.file("locks", stage, ".lock"), busy):
            yield

    def is_finished(self, stage: Stage) -> bool:
        """Whether a stage is finished, and was run after those that it needs.

        Raises:
            ValueError: if it was run with other settings and is not replaceable.
        """
        path = self._mark(stage)
        mark = read_json(path)
        if mark is None or mark["needs"] != self._runs_of(stage.needs):
            return False
        before, now = mark["settings"], json.loads(json.dumps(stage.settings))
        if before != now and stage.replaceable:
            return False
        if before != now:
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise ValueError(
                f"The stage {stage.name!r} was run with other settings ({', '.join(changed)}). Choose another "
                f"--output_dir, or remove {path} and what the stage wrote, to run it again."
            )
        return True

    def finished(self) -> set[str]:
        """Names of the stages that need not be run; what needs a stage that must be run again is not among them.

        Raises:
            ValueError: if a finished stage was run with other settings.
        """
        found: set[str] = set()
        for name, stage in self.stages.items():
            if self.is_finished(stage) and found.issuperset(stage.needs):
                found.add(name)
        return found

    def _mark(self, stage: Stage) -> Path:
        return self.file("finished", stage, ".json")

    def _runs_of(self, names: Sequence[str]) -> dict[str, str | None]:
        """The id of the finished run of each stage; None for a stage that is not finished."""
        return {name: (read_json(self._mark(self[name])) or {}).get("run") for name in names}

    def run(self, name: str, run_command: Callable[[str, list[str]], int]) -> int:
        """Run a stage in this process, unless it is finished.

        Under a launcher, every process calls this, and rank 0 holds the lock.

        Args:
            name (`str`): name of the stage.
            run_command (`Callable[[str, list[str]], int]`): runs a sub-command with its arguments; returns the exit
                status.

        Returns:
            `int`: the exit status of the sub-command, 0 if the stage is finished.

        Raises:
            ValueError: if a stage that it needs is not finished, or it was run with other settings.
        """
        stage = self[name]
        first = os.environ.get("RANK", "0") == "0"
        with self.lock(stage) if first else contextlib.nullcontext():
            # All ranks must decide alike, and those of a launcher were started after a look at the mark.
            if launched_world_size() == 1 and self.is_finished(stage):
                print(f"The stage {name!r} is done already.")
                return 0
            needs = self._runs_of(stage.needs)
            if missing := [one for one, run in needs.items() if run is None]:
                raise ValueError(f"The stage {name!r} needs the stage {missing[0]!r}, which is not finished.")
            started = time.perf_counter()
            status = run_command(stage.command, ["--config", str(self._write_config(stage))])
            if first and status == 0:
                seconds = round(time.perf_counter() - started, 1)
                mark = {"run": uuid.uuid4().hex, "needs": needs, "settings": stage.settings, "seconds": seconds}
                write_json(self._mark(stage), mark)
            return status

    def _write_config(self, stage: Stage) -> Path:
        """Write the config file of a stage; all ranks write the same."""
        path = self.file("configs", stage, ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        settings = {**stage.settings, **stage.late_settings()}
        partial.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        os.replace(partial, path)
        return path
