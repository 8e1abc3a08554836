"""Stages of an experiment: commands that need one another, run once each, side by side where there are devices."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_sam.runtime.disk import write_json

# Tells to which stage a process belongs; launchers start theirs in sessions of their own, without open files.
_STAGE = "HF_SAM_STAGE"

# Lines of a log that are shown when its stage fails.
_TAIL = 25


@dataclass(frozen=True)
class Stage:
    """A command, and what must be done before it.

    Attributes:
        name (`str`): what it is called, and its log.
        command (`Callable[[], list[str]]`): the command; asked for when the stages before it are done.
        settings (`dict`): what it depends on; a stage whose settings changed is not done.
        needs (`tuple[str, ...]`): names of stages.
        wide (`bool`): whether it takes all devices at once.
    """

    name: str
    command: Callable[[], list[str]]
    settings: dict
    needs: tuple[str, ...] = ()
    wide: bool = False


@dataclass
class _Running:
    process: subprocess.Popen
    slots: list[int]
    started: float
    log: Path


@dataclass
class Stages:
    """Runs stages in an order in which each comes after those that it needs.

    What is done is remembered in files below `folder`, so that a chain that was interrupted goes on where it was.

    Args:
        stages (`Sequence[Stage]`): in any order.
        folder (`Path`): of marks and logs.
        devices (`Sequence[str]`): what `CUDA_VISIBLE_DEVICES` is set to for each; empty names on the CPU.
        say (`Callable[[str], None]`): tells how it goes.
    """

    stages: Sequence[Stage]
    folder: Path
    devices: Sequence[str] = ("",)
    say: Callable[[str], None] = print
    _running: dict[str, _Running] = field(default_factory=dict)
    _lock: int = -1

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        for stage in self.stages:
            if missing := [name for name in stage.needs if name not in names]:
                raise ValueError(f"The stage {stage.name!r} needs {missing[0]!r}, which there is not.")

    def mark(self, stage: Stage) -> Path:
        """The file that tells that a stage is done."""
        return self.folder / "done" / f"{stage.name.replace('/', '-')}.json"

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage has been through, after the stages that it needs.

        Raises:
            ValueError: if it has, with other settings.
        """
        path = self.mark(stage)
        if not path.exists():
            return False
        mark = json.loads(path.read_text(encoding="utf-8"))
        if mark["needs"] != self._runs_of(stage.needs):
            return False  # one of them was run again
        done = mark["settings"]
        now = json.loads(json.dumps(stage.settings))
        if done != now:
            changed = sorted(name for name in done.keys() | now.keys() if done.get(name) != now.get(name))
            raise ValueError(
                f"The stage {stage.name!r} was run with other settings ({', '.join(changed)}). Choose another "
                f"--output_dir, or remove {path} and what the stage wrote, to run it again."
            )
        return True

    def _runs_of(self, names: Sequence[str]) -> dict[str, str | None]:
        """Which run of each stage it was that is done."""
        runs = {}
        for stage in self.stages:
            if stage.name in names:
                path = self.mark(stage)
                runs[stage.name] = json.loads(path.read_text(encoding="utf-8"))["run"] if path.exists() else None
        return runs

    def run(self) -> bool:
        """Run what is not done; returns whether all is done in the end.

        A stage that fails leaves the others running; those that need it are not started.

        Raises:
            ValueError: if a stage that is done has other settings now, or somebody else is at work in the folder.
        """
        with self._alone():
            return self._run()

    @contextlib.contextmanager
    def _alone(self):
        """Nobody else works in the folder: neither another driver nor a stage whose driver was killed.

        Stages inherit the lock, and what a launcher starts is known by its environment.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if processes_of(self.folder):
                    raise BlockingIOError
            except BlockingIOError:
                raise ValueError(
                    f"Another run, or a stage that it left behind, is still at work in {self.folder}. Wait until it "
                    "is through, or end it."
                ) from None
            self._lock = file.fileno()
            yield

    def _run(self) -> bool:
        done = {stage.name for stage in self.stages if self.is_done(stage)}
        # What needs a stage that is run again is run again, too.
        while again := {stage.name for stage in self.stages if stage.name in done and not set(stage.needs) <= done}:
            done -= again
        if done:
            self.say(f"{len(done)} of {len(self.stages)} stages are done already.")
        failed: set[str] = set()
        free = list(range(len(self.devices)))
        try:
            while len(done) + len(failed) < len(self.stages):
                waiting = [s for s in self.stages if s.name not in done | failed | self._running.keys()]
                for stage in waiting:
                    takes = len(self.devices) if stage.wide else 1
                    if set(stage.needs) <= done and len(free) >= takes:
                        try:
                            command = stage.command()
                        except (ValueError, OSError) as error:
                            self.say(f"{stage.name} cannot be started: {error}")
                            failed.add(stage.name)
                            continue
                        slots, free = free[:takes], free[takes:]
                        self._start(stage, command, slots)
                if not self._running:
                    break  # what is left needs what failed
                name, status = self._wait()
                ended = self._running.pop(name)
                free = sorted([*free, *ended.slots])
                (failed if status else done).add(name)
                self._tell(name, status, ended, len(done))
        finally:
            self._stop()
        return len(done) == len(self.stages)

    def _start(self, stage: Stage, command: list[str], slots: list[int]) -> None:
        log = self.folder / "logs" / f"{stage.name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, _STAGE: _label(self.folder, stage.name)}
        names = [self.devices[slot] for slot in slots]
        if all(names):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
        else:
            # As many stages as processors, so one thread each.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.devices))))
        with log.open("a", encoding="utf-8") as out:
            out.write(f"$ {' '.join(command)}\n")
            out.flush()
            # A group of its own, so that Ctrl-C reaches the driver first.
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        self._running[stage.name] = _Running(process, slots, time.perf_counter(), log)
        self.say(f"started {stage.name}" + (f" on {', '.join(names)}" if all(names) else ""))

    def _wait(self) -> tuple[str, int]:
        while True:
            for name, running in self._running.items():
                status = running.process.poll()
                if status is not None:
                    return name, status
            time.sleep(0.2)

    def _tell(self, name: str, status: int, ended: _Running, done: int) -> None:
        seconds = time.perf_counter() - ended.started
        if status == 0:
            stage = next(stage for stage in self.stages if stage.name == name)
            mark = {"run": uuid.uuid4().hex, "needs": self._runs_of(stage.needs)}
            write_json(self.mark(stage), {**mark, "settings": stage.settings, "seconds": round(seconds, 1)})
            self.say(f"[{done}/{len(self.stages)}] {name} took {seconds:.0f} s")
            return
        self._kill(name)  # what a launcher that failed left behind
        lines = ended.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        self.say(f"{name} failed with status {status}; the end of {ended.log}:\n" + "\n".join(lines))

    def _stop(self) -> None:
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        for name, running in self._running.items():
            # A launcher gives its own processes half a minute.
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(timeout=60)
            self._kill(name)
            running.process.wait()
        self._running.clear()

    def _kill(self, name: str) -> None:
        for process in processes_of(self.folder, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _label(folder: Path, name: str | None = None) -> str:
    """What tells a stage, or a folder, from all others; none is the beginning of that of another stage or folder."""
    return f"{folder.resolve()}\n" + (f"{name}\n" if name else "")


def processes_of(folder: Path, name: str | None = None) -> list[int]:
    """Processes of a stage, or of all stages in a folder, also those in other sessions, by their environment.

    Found in /proc; where there is none, stages are ended by their process group alone.
    """
    wanted = f"{_STAGE}={_label(folder, name)}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(entry.startswith(wanted) for entry in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return [process for process in found if process != os.getpid()]


def python(script: Path, config: Path, processes: int = 1, accelerate_config: str | None = None) -> list[str]:
    """The command that runs a recipe with a config, under `accelerate launch` if on several devices."""
    if processes == 1:
        return [sys.executable, str(script), "--config", str(config)]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    chosen = ["--config_file", accelerate_config] if accelerate_config else ["--multi_gpu", "--mixed_precision", "no"]
    return [*launcher, *chosen, "--num_processes", str(processes), str(script), "--config", str(config)]
