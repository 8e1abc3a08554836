"""Starting a command of `hf-sam` in other processes, with the launcher of accelerate."""

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

# Tells the processes that a command launches not to launch again what they read in the config file.
_LAUNCHED = "HF_SAM_LAUNCHED"


def run_or_launch(command: str, parser: ConfigParser, argv: Sequence[str], program: Callable[[list[str]], int]) -> int:
    """Run a command in this process, or under `accelerate launch` if there are flags of the launcher among its flags.

    As in `trl sft`: what the parser of the command does not know (`--num_processes 2`, `--accelerate_config FILE`) goes
    to `accelerate launch`, which starts the same command in every process.

    Args:
        command (`str`): name of the command.
        parser ([`~hf_sam.runtime.config.ConfigParser`]): of its flags.
        argv (`Sequence[str]`): all flags.
        program (`Callable[[list[str]], int]`): what the command does in one process; returns the exit status.

    Raises:
        UsageError: if a flag, or a name in the file of `--config`, belongs to neither.
    """
    config, unknown = _unknown(parser, argv)
    flags = list(parser._option_string_actions)
    if is_launched():
        end_with_launcher()
        if unknown:
            raise unknown_arguments(unknown, flags)
    elif config or unknown:
        check_flags(unknown, flags)
        return launch(command, [*as_flags(config), *unknown], _without(argv, unknown))
    return program(argv)


def _unknown(parser: ConfigParser, argv: Sequence[str]) -> tuple[dict, list[str]]:
    """What the parser does not know, in the files of `--config` and in `argv`; prints the help if asked to.

    The arguments are not built yet: in a process that only launches others, they would set up devices.
    """
    files, flags = parser.split(argv)
    settings = parser.load(files)
    if foreign := {name: found for name, found in settings.items() if f"--{name}" not in launcher_flags()}:
        raise parser.unknown_setting(foreign, [flag.removeprefix("--") for flag in launcher_flags()])
    return {name: value for name, (_, value) in settings.items()}, parser.parse_known_args(flags)[1]


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without `taken`, which are some of its elements in their order."""
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

    The launcher runs in this process, so that what is left of a failure is a status: its own report would only repeat,
    in some thirty lines, that a process failed that has said why.

    Args:
        command (`str`): the command.
        flags (`Sequence[str]`): those of the launcher.
        argv (`Sequence[str]`): those of the command.

    Returns:
        `int`: the exit status of the process that failed first, 128 and the number of the signal that ended it, or 0.

    Raises:
        UsageError: if the launcher does not take its flags.
    """
    from accelerate.commands.launch import launch_command

    flags = list(flags)
    if "--accelerate_config" in flags:
        flags = _with_accelerate_config(flags)
    arguments = raise_usage_errors(launcher_parser()).parse_args([*flags, "--module", "hf_sam", command, *argv])
    # Its lines about the process that failed; the status tells the same.
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
    if -status != signal.SIGINT:  # the launched processes got Ctrl-C, too, and tell it; one that is killed cannot
        print(f"hf-sam {command}: a process was ended by {signal.Signals(-status).name}.", file=sys.stderr)
    return 128 - status  # as a shell has it


def _status_of(error: Exception) -> int | None:
    """Exit status of the process that failed first; None if the launcher itself failed."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode
    # Of torchrun, which only the backends import from.
    if type(error).__name__ == "ChildFailedError":
        return error.get_first_failure()[1].exitcode
    if type(error).__name__ == "SignalException":  # this process was asked to end, and has ended the others
        return -int(error.sigval)
    return None


def _with_accelerate_config(flags: list[str]) -> list[str]:
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return resolve_accelerate_config_argument(flags)
    except ValueError as error:
        raise UsageError(str(error)) from error


def as_flags(config: dict) -> list[str]:
    """What a config file holds for the launcher, as flags: `switch: true` is the plain `--switch`."""
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
    """Check that what a command does not know are flags of the launcher, each with its value.

    Args:
        unknown (`Sequence[str]`): flags and values that the parser of the command left.
        known (`Sequence[str]`): the flags of the command, for the message.

    Raises:
        UsageError: if there is another argument.
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
