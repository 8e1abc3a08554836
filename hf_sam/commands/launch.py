"""Start a command of `hf-sam` in several processes, with the launcher of accelerate."""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from ..runtime.config import ConfigParser
from ..runtime.errors import UsageError, raise_usage_errors, unknown_arguments
from ..runtime.processes import end_with_launcher

# Set in launched processes, which must not launch again because of launcher flags in a config file.
_LAUNCHED = "HF_SAM_LAUNCHED"


def run_or_launch(command: str, parser: ConfigParser, argv: Sequence[str], program: Callable[[list[str]], int]) -> int:
    """Run a command in this process, or under `accelerate launch` if it has launcher flags.

    As in `trl sft`, flags that the parser of the command does not know (`--num_processes 2`, `--accelerate_config
    FILE`) are passed to `accelerate launch`, which starts the same command in every process.

    Args:
        command (`str`): name of the command.
        parser ([`~hf_sam.runtime.config.ConfigParser`]): parser of the command.
        argv (`Sequence[str]`): all flags.
        program (`Callable[[list[str]], int]`): runs the command in one process; returns the exit status.

    Raises:
        UsageError: if neither the command nor the launcher knows a flag or a setting in the file of `--config`.
    """
    config, unknown = _launcher_settings(parser, argv)
    flags = list(parser._option_string_actions)
    if is_launched():
        end_with_launcher()
        if unknown:
            raise unknown_arguments(unknown, flags)
    elif config or unknown:
        check_flags(unknown, flags)
        return launch(command, [*as_flags(config), *unknown], _without(argv, unknown))
    return program(argv)


def _launcher_settings(parser: ConfigParser, argv: Sequence[str]) -> tuple[dict, list[str]]:
    """Settings in config files and flags in `argv` that the parser does not know. With `--help`, prints the help.

    Training arguments are not created, because they would initialize devices in a process that only launches others.
    """
    files, flags = parser.split(argv)
    settings = parser.load(files)
    if foreign := {name: found for name, found in settings.items() if f"--{name}" not in launcher_flags()}:
        raise parser.unknown_setting(foreign, [flag.removeprefix("--") for flag in launcher_flags()])
    return {name: value for name, (_, value) in settings.items()}, parser.parse_known_args(flags)[1]


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without `taken`, a subsequence of it."""
    rest, taken = [], list(taken)
    for argument in argv:
        if taken and argument == taken[0]:
            taken.pop(0)
        else:
            rest.append(argument)
    return rest


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def launcher_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launcher_flags() -> set[str]:
    """The flags of the launcher."""
    return {"--accelerate_config", *launcher_parser()._option_string_actions}


def launch(command: str, flags: Sequence[str], argv: Sequence[str]) -> int:
    """Start `hf-sam COMMAND` under `accelerate launch`, and wait for it.

    The launcher runs in this process, so that a failure becomes an exit status. The failed process has reported its
    error already; the report of the launcher would only add thirty lines.

    Args:
        command (`str`): the command.
        flags (`Sequence[str]`): flags of the launcher.
        argv (`Sequence[str]`): flags of the command.

    Returns:
        `int`: 0, the exit status of the process that failed first, or 128 plus the number of the signal that ended it.

    Raises:
        UsageError: if the launcher rejects its flags.
    """
    from accelerate.commands.launch import launch_command

    flags = list(flags)
    if "--accelerate_config" in flags:
        flags = _with_accelerate_config(flags)
    arguments = raise_usage_errors(launcher_parser()).parse_args([*flags, "--module", "hf_sam", command, *argv])
    # Silence its report about the failed process.
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(arguments)
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except Exception as error:
        status = _status_of(error)
        if status is None:
            raise
    else:
        return 0
    finally:
        del os.environ[_LAUNCHED]
        elastic.setLevel(level)
    if status > 0:
        return status
    if -status != signal.SIGINT:  # launched processes report Ctrl-C themselves; a killed process cannot
        print(f"hf-sam {command}: a process was terminated by {signal.Signals(-status).name}.", file=sys.stderr)
    return 128 - status  # convention of shells


def _status_of(error: Exception) -> int | None:
    """Exit status of the process that failed first; None if the launcher itself failed."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode
    # Raised by torchrun. Compared by name, because only backends import torch.distributed.
    if type(error).__name__ == "ChildFailedError":
        return error.get_first_failure()[1].exitcode
    if type(error).__name__ == "SignalException":  # this process got a signal and has terminated the others
        return -int(error.sigval)
    return None


def _with_accelerate_config(flags: list[str]) -> list[str]:
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return resolve_accelerate_config_argument(flags)
    except ValueError as error:
        raise UsageError(str(error)) from error


def as_flags(config: dict) -> list[str]:
    """Convert launcher settings of a config file to flags; `switch: true` becomes `--switch`."""
    actions = launcher_parser()._option_string_actions
    result = []
    for name, value in config.items():
        action = actions.get(f"--{name}")
        if value is None:
            continue
        if action is None or action.nargs != 0:
            result += [f"--{name}", str(value)]
        elif str(value).lower() in ("true", "yes", "1"):
            result.append(f"--{name}")
    return result


def check_flags(unknown: Sequence[str], known: Sequence[str]) -> None:
    """Check that unknown arguments of a command are flags of the launcher, each with its value.

    Args:
        unknown (`Sequence[str]`): arguments that the parser of the command does not know.
        known (`Sequence[str]`): flags of the command, for suggestions in the message.

    Raises:
        UsageError: if the launcher does not know an argument either.
    """
    actions = launcher_parser()._option_string_actions
    takes_value = False
    for argument in unknown:
        name, has_value, _ = argument.partition("=")
        if argument.startswith("-"):
            if name not in actions and name != "--accelerate_config":
                raise unknown_arguments([argument], {*known, *launcher_flags()})
            takes_value = not has_value and (name not in actions or actions[name].nargs != 0)
        elif takes_value:
            takes_value = False
        else:
            raise unknown_arguments([argument], ())
