"""The command `hf-sam`: one module per sub-command, each with `main(argv) -> exit status`.

This module does not import torch or transformers, so that `hf-sam --help` is fast.
"""

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass

from ..runtime.errors import UsageError, did_you_mean
from .reporting import DEBUG, run_command


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        module (`str`): name of its module in this package.
        usage (`str`): the command with its positional arguments.
        help (`str`): description in the list of commands; lines of at most 100 characters.
        extra (`str` or `None`): the extra of hf-sam that it needs.
        packages (`tuple[str, ...]`): packages of that extra that it cannot start without.
        runs_a_script (`bool`): whether it runs a script of the user, whose errors keep their traceback.
    """

    module: str
    usage: str
    help: str
    extra: str | None = None
    packages: tuple[str, ...] = ()
    runs_a_script: bool = False


_SFT = ("trl", "datasets")
_EVAL = ("datasets", "scipy", "matplotlib")
_RECIPES = ("datasets", "trl")

COMMANDS = {
    "sft": Command("sft", "sft", "supervised fine-tuning: TRL's `sft` script with SAM", "sft", _SFT),
    "clm": Command("clm", "clm", "pretraining on plain text, from a checkpoint or from scratch", "sft", _SFT),
    "run": Command(
        "run",
        "run SCRIPT",
        "run any training script with SAM in its trainers; SAM flags before SCRIPT are defaults for scripts\n"
        "that do not parse flags (end a list or a switch with `--`)",
        runs_a_script=True,
    ),
    "pretrain": Command(
        "pretrain",
        "pretrain",
        "pretraining, annealing and mid-training with budgets in tokens",
        "recipes",
        _RECIPES[:1],
    ),
    "sweep": Command("sweep", "sweep", "supervised fine-tuning over a sweep of learning rates", "recipes", _RECIPES),
    "evaluate": Command(
        "evaluate",
        "evaluate",
        "forgetting, quantization damage, sharpness and benchmarks of a base model and its fine-tuned models",
        "eval",
        _EVAL,
    ),
    "suggest-rho": Command(
        "suggest_rho",
        "suggest-rho MODEL",
        "the loss at the perturbed weights for many radii on your data, and radii to start with",
        "eval",
        _EVAL,
    ),
    "report": Command("report", "report DIR...", "compare evaluations; the first one is the reference", "eval", _EVAL),
    "compare": Command(
        "compare",
        "compare",
        "evaluate several base models with their sweeps, and compare forgetting and quantization damage",
        "recipes",
        _EVAL,
    ),
    "reproduce": Command(
        "reproduce",
        "reproduce",
        "run all stages of an experiment preset: pretrain, anneal, fine-tune, evaluate, compare",
        "recipes",
        (*_EVAL, "trl"),
    ),
    "toy-data": Command(
        "toy_data",
        "toy-data",
        "generate the data of the preset `toy`, without network access",
        "recipes",
        ("datasets", "reasoning_gym"),
    ),
}

_PIPE_CLOSED = 141  # what shells return for SIGPIPE

_FOOTER = """\
`hf-sam COMMAND --help` lists the flags of a command. User errors are reported in one line;
`hf-sam --debug COMMAND` (or HF_SAM_DEBUG=1) shows their traceback. To start `run` with several processes, use
`accelerate launch -m hf_sam run SCRIPT ...` or `torchrun -m hf_sam run SCRIPT ...`.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv[1:]` when omitted).

    Returns:
        `int`: the exit status: 0, 1 if a measurement failed, 2 after a user error, 130 after Ctrl-C, 141 if the reader
        of its output is gone, or the status of a launched process.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader, e.g. `head`, has what it wanted. At exit, Python would try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _main(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--debug"]:
        os.environ[DEBUG] = "1"  # launched processes inherit it
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return run_command("hf-sam", lambda: _unknown_command(name))
    command = COMMANDS[name]
    status = run_command(f"hf-sam {name}", lambda: _run(command, rest), library_errors=not command.runs_a_script)
    if "accelerate" in sys.modules:
        importlib.import_module("..runtime.distributed", __name__).leave_processes(failed=status != 0)
    return status


def usage() -> str:
    """The text of `hf-sam --help`."""
    width = max(len(command.usage) for command in COMMANDS.values()) + 3
    lines = ["usage: hf-sam COMMAND [flags]", "", "commands:"]
    for command in COMMANDS.values():
        text = command.help.replace("\n", "\n" + " " * (width + 2))
        lines.append(f"  {command.usage:<{width}}{text}")
    return "\n".join([*lines, "", _FOOTER.rstrip()])


def _unknown_command(name: str) -> int:
    near = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
    raise UsageError(f"there is no command {name!r}{near}")


def _run(command: Command, argv: list[str]) -> int:
    missing = [name for name in command.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed. Install it: pip install 'hf-sam[{command.extra}]'.")
    return importlib.import_module(f".{command.module}", __name__).main(argv)
