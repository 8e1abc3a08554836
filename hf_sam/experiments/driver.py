"""Runs the stages of an experiment on one machine, each in a process of its own."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from ..runtime.locks import locked
from .stages import Chain, Stage

# Lines of a log that are shown when its stage fails.
_TAIL = 25
# Seconds that a stage has to end when the driver is interrupted; a launcher gives its own processes half of it.
_GRACE = 60


def _print(line: str) -> None:
    print(line, flush=True)  # also into a file


def run_chain(
    chain: Chain,
    devices: Sequence[str],
    command: Callable[[Stage], list[str]],
    say: Callable[[str], None] = _print,
) -> bool:
    """Run the stages that are not finished, each when those that it needs are.

    Stages run side by side, one on each device; a wide one has all devices. A stage that fails leaves the others
    running; those that need it are not started. SIGINT and SIGTERM end the stages. If the driver is killed, its stages
    go on, and the next driver waits for them.

    Args:
        chain ([`Chain`]): the stages.
        devices (`Sequence[str]`): `CUDA_VISIBLE_DEVICES` of each device; an empty name stands for a part of the CPU.
        command (`Callable[[Stage], list[str]]`): the command line that runs a stage, see [`Chain.run`].
        say (`Callable[[str], None]`): prints progress.

    Returns:
        `bool`: whether all stages are finished.

    Raises:
        ValueError: if a finished stage was run with other settings.
    """
    with locked(chain.folder / "locks" / ".driver.lock", f"Waiting for another driver, which works in {chain.folder}."):
        for stage in chain.stages.values():
            with chain.lock(stage):
                pass  # a driver that was killed may have left it running, on a device that others must not share
        finished = chain.finished()
        if finished:
            say(f"{len(finished)} of {len(chain.stages)} stages are done already.")
        return asyncio.run(_Driver(chain, devices, command, say, finished).run())


class _Driver:
    def __init__(self, chain: Chain, devices: Sequence[str], command, say, finished: set[str]):
        self._chain, self._command, self._say, self._finished = chain, command, say, finished
        self._devices = list(devices)
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(self._devices)):
            self._free.put_nowait(index)
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    async def run(self) -> bool:
        with contextlib.suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
        async with asyncio.TaskGroup() as group:
            for name, stage in self._chain.stages.items():  # each after those that it needs
                self._tasks[name] = group.create_task(self._run_stage(stage))
        return all(task.result() for task in self._tasks.values())

    async def _run_stage(self, stage: Stage) -> bool:
        if not all(await asyncio.gather(*(self._tasks[name] for name in stage.needs))):
            return False
        if stage.name in self._finished:
            return True
        async with self._turn:  # one after the other, so that a wide stage gets all devices
            taken = [await self._free.get() for _ in range(len(self._devices) if stage.wide else 1)]
        try:
            return await self._run_process(stage, [self._devices[index] for index in sorted(taken)])
        finally:
            for index in taken:
                self._free.put_nowait(index)

    async def _run_process(self, stage: Stage, devices: list[str]) -> bool:
        command, started = self._command(stage), time.perf_counter()
        path = self._chain.file("logs", stage, ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            # In a session of its own, so that Ctrl-C reaches the driver alone.
            process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, env=self._environment(devices), start_new_session=True
            )
        self._say(f"started {stage.name}" + (f" on {', '.join(devices)}" if all(devices) else ""))
        try:
            status = await process.wait()
        finally:
            await _end(process)
        if status == 0:
            self._finished.add(stage.name)
            took = f"{stage.name} took {time.perf_counter() - started:.0f} s"
            self._say(f"[{len(self._finished)}/{len(self._chain.stages)}] {took}")
            return True
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        self._say(f"{stage.name} failed with status {status}; the end of {path}:\n" + "\n".join(lines))
        return False

    def _environment(self, devices: list[str]) -> dict[str, str]:
        if all(devices):
            return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
        threads = max(1, (os.cpu_count() or 1) * len(devices) // len(self._devices))  # the stages share the processors
        return {"OMP_NUM_THREADS": str(threads), **os.environ}


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process that is still running."""
    if process.returncode is not None:
        return
    process.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GRACE):
            await process.wait()
            return
    process.kill()
    await process.wait()
