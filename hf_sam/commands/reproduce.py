"""`hf-sam reproduce`: a whole experiment: pretrain, anneal in several ways, fine-tune over a sweep, quantize, compare.

`--preset` names the experiment. Finished stages are not run again, and an experiment that was interrupted is resumed by
the same command. Stages run side by side on the GPUs of the machine. `--stage NAME` runs one stage, for any scheduler;
`--list` prints the stages in an order in which they can be run, each with those that it needs.
"""

import asyncio
import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from ..experiments.driver import run_chain
from ..experiments.experiment import Experiment
from ..experiments.presets import check_seeds, read_preset
from ..experiments.stages import Chain, Stage
from ..report.tables import summary_document
from ..runtime.config import ConfigParser, DryRunArguments
from ..runtime.errors import UsageError
from ..runtime.processes import end_with_launcher
from . import COMMANDS
from .launch import is_launched, launch

# Exit status after SIGTERM, as a shell has it.
_TERMINATED = 143


@dataclass
class ReproduceArguments(DryRunArguments):
    """The experiment, its output folder, and what to do with it."""

    preset: str = field(default="toy", metadata={"help": "Name of a preset, or a YAML file."})
    output_dir: str | None = field(default=None, metadata={"help": "Output folder; default: outputs/PRESET."})
    workers: int = field(
        default=0, metadata={"help": "Stages side by side on the CPU; default: a core each. On GPUs, one each."}
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "Training seeds: every run once with each; default: those of the preset."},
    )
    stage: str | None = field(default=None, metadata={"help": "Run only this stage, in this process."})
    list: bool = field(default=False, metadata={"help": "Print each stage and the stages that it needs, and exit."})


def make_parser() -> ConfigParser:
    """The parser of the command."""
    return ConfigParser(ReproduceArguments, prog="hf-sam reproduce", description=__doc__.split("\n", 1)[0])


def main(argv: list[str]) -> int:
    """Run the experiment, or one stage of it; returns the exit status."""
    (settings,) = make_parser().parse(argv)
    preset = read_preset(settings.preset)
    if settings.seeds is not None:
        check_seeds(settings.seeds, "--seeds")
        preset = {**preset, "seeds": settings.seeds}
    output = Path(settings.output_dir or f"outputs/{Path(settings.preset).stem}")
    if settings.dry_run:
        print(Experiment(preset, output, devices=1 if preset.get("device") == "cpu" else 8).plan(_plan_command))
        return 0
    if settings.list:
        for stage in Chain(Experiment(preset, output, devices=1).stages(), output).stages.values():
            print(stage.name, *stage.needs)
        return 0
    if is_launched() and settings.stage is None:
        raise UsageError("start it without a launcher, because it launches its stages, or name one stage: --stage")
    devices = find_devices(preset, settings.workers)
    experiment = Experiment(preset, output, len(devices))
    chain = Chain(experiment.stages(), output)
    if settings.stage is not None:
        return run_stage(chain, chain[settings.stage], preset, len(devices), argv)
    flags = ["--preset", settings.preset, "--output_dir", str(output)]
    if settings.seeds is not None:
        flags += ["--seeds", *map(str, settings.seeds)]
    if not _run_all(chain, devices, flags):
        print("Not all stages are done; give the same command again to resume.", file=sys.stderr)
        return 1
    for comparison in experiment.comparisons():
        if comparison.name:
            print(f"\n{comparison.name}\n")
        _print_report(comparison.folder, experiment.labels(comparison))
    return 0


def _print_report(folder: Path, runs: list[str]) -> None:
    if len(runs) == 1:  # nothing to compare
        print(f"The report is in {folder / runs[0] / 'report.html'}.")
        return
    summary = json.loads((folder / "comparison" / "summary.json").read_text(encoding="utf-8"))
    print(summary_document(summary).markdown())
    print(f"The whole comparison is in {folder / 'comparison' / 'report.html'}.")


def _run_all(chain: Chain, devices: list[str], flags: list[str]) -> bool:
    def command(stage: Stage) -> list[str]:
        return [sys.executable, "-m", "hf_sam", "reproduce", *flags, "--stage", stage.name]

    try:
        return run_chain(chain, devices, command)
    except asyncio.CancelledError:  # after SIGTERM, when the stages have ended
        sys.exit(_TERMINATED)


def run_stage(chain: Chain, stage: Stage, preset: dict, devices: int, argv: list[str]) -> int:
    """Run one stage, on all devices of this machine if it is a wide one; returns the exit status.

    Args:
        chain ([`Chain`]): the experiment.
        stage ([`Stage`]): the stage to run.
        preset (`dict`): may name a config file of `accelerate launch`: `accelerate_config`.
        devices (`int`): number of GPUs of this machine.
        argv (`list[str]`): the command line, which the processes of a wide stage are started with.
    """
    if is_launched():
        end_with_launcher()
    elif stage.wide and preset.get("device") != "cpu":
        with chain.lock(stage):  # processes of a launcher that was killed may still have it
            if chain.is_finished(stage):
                return 0
        config = preset.get("accelerate_config")
        # Port 0 is any free one: another experiment may run on other GPUs of this machine.
        default = ["--multi_gpu", "--mixed_precision", "no", "--main_process_port", "0"]
        flags = ["--config_file", config] if config else default
        return launch("reproduce", [*flags, "--num_processes", str(devices)], argv)
    return chain.run(stage.name, _run_command)


def _run_command(name: str, argv: list[str]) -> int:
    return _module(name).main(argv)


def _plan_command(name: str, settings: dict) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        return _module(name).plan_text(["--config", file.name, "--dry_run"])


def _module(command: str):
    return importlib.import_module(f".{COMMANDS[command].module}", __package__)


def find_devices(preset: dict, workers: int) -> list[str]:
    """`CUDA_VISIBLE_DEVICES` of each device that stages run on: the GPUs, or an empty one for each worker on the CPU.

    Raises:
        ValueError: if the preset needs GPUs and there are none.
    """
    if preset.get("device") == "cpu":
        return [""] * (workers or os.cpu_count() or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.accelerator.device_count())]
    if not torch.accelerator.is_available():
        raise ValueError(
            "This preset needs GPUs, and there are none. --preset toy runs on the CPU; --dry_run anywhere."
        )
    return names
