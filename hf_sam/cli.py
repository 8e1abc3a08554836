"""The `hf-sam` command: `sft`, `clm`, `run` for any script, `evaluate` and `report`.

In the style of `trl sft`: flags of the command's own parser, `--config FILE` for a YAML file with more of them, and
whatever that parser does not know (`--num_processes 2`, `--accelerate_config FILE`) goes to `accelerate launch`, which
then starts the same command in every process. Without such flags the command runs in this process.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

# Tells the processes that this command launches not to launch again what they read in the config file.
_LAUNCHED = "HF_SAM_LAUNCHED"

_USAGE = """\
usage: hf-sam COMMAND [flags]

commands:
  sft             supervised fine-tuning: TRL's `sft` script with SAM
  clm             pretraining on plain text, from a checkpoint or from scratch
  run SCRIPT      any training script, with SAM in the trainers that it names; flags of SAM in front of SCRIPT are
                  defaults for scripts that do not parse flags (end a list or a switch with `--`)
  evaluate        forgetting, damage of quantization, sharpness, benchmarks of a base model and those made from it
  report DIR...   compare evaluations, the first of which is the reference

`hf-sam COMMAND --help` lists the flags. Start `run` on several processes with
`accelerate launch -m hf_sam run SCRIPT ...` or `torchrun -m hf_sam run SCRIPT ...`.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (of the process when omitted); returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    command, *rest = argv
    if command == "run":
        return _run(rest)
    if command not in ("sft", "clm", "evaluate", "report"):
        print(f"hf-sam: there is no command {command!r}.\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    extra = "sft" if command in ("sft", "clm") else "eval"
    needed = {"sft": ("trl", "datasets"), "eval": ("datasets", "scipy", "matplotlib")}[extra]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"hf-sam {command} needs {', '.join(missing)}. Install them: pip install 'hf-sam[{extra}]'.",
            file=sys.stderr,
        )
        return 1
    if command == "report":
        from .report.command import report_main

        return report_main(rest)
    return _start(command, rest)


def _run(argv: list[str]) -> int:
    import argparse

    from transformers import HfArgumentParser

    from .arguments import SAMArguments
    from .script import run_script

    parser = grouped(HfArgumentParser(SAMArguments, prog="hf-sam run"))
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own flags, among them those of SAM")
    sam, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments in front of the script: {' '.join(unknown)}")
    if not os.path.isfile(rest.script):
        parser.error(f"there is no script {rest.script!r}")
    plain = SAMArguments()
    chosen = {name: value for name, value in vars(sam).items() if value != getattr(plain, name)}
    run_script(rest.script, rest.arguments, **chosen)
    return 0


def _start(command: str, argv: list[str]) -> int:
    """Run a command in this process, or launch it in others if there are flags of the launcher."""
    parser = _parser(command)
    from_config, unknown = _unknown(parser, argv)
    if _is_launched():
        # What else the config file holds was for the launcher, if the launcher knows it.
        unknown += [name for name in from_config[::2] if name not in _launcher_flags()]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    elif from_config or unknown:
        return _launch(command, from_config, unknown, _without(argv, unknown))
    return _program(command)(argv)


def _unknown(parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """What the parser does not know, in the file of `--config` and in `argv`; prints the help where asked to.

    The arguments are not built yet: in a process that only launches others, they would set up devices.
    """
    import yaml

    flags, from_config = list(argv), []
    if "--config" in flags[:-1]:
        index = flags.index("--config")
        with open(flags[index + 1], encoding="utf-8") as file:
            config = yaml.safe_load(file)
        if not isinstance(config, dict):
            parser.error(f"the config file {flags[index + 1]} must hold a mapping of flags to values")
        del flags[index : index + 2]
        config.pop("env", None)  # for the process that trains
        from_config = parser.set_defaults_with_config(**config)
    return from_config, parser.parse_known_args(flags)[1]


def _is_launched() -> bool:
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def _program(command: str) -> Callable[[list[str]], int]:
    """What runs in this process, and returns the exit status."""
    if command == "evaluate":
        from .report.command import evaluate_main

        return evaluate_main
    if command == "clm":
        from .clm import main as program
    else:
        program = _sft

    def trained(argv: list[str]) -> int:
        program(argv)
        return 0

    return trained


def _sft(argv: list[str]) -> None:
    import trl.scripts.sft

    from .script import run_script

    run_script(trl.scripts.sft.__file__, argv)


def _parser(command: str):
    """The parser of the program, with the flags of SAM in a group of their own in the help."""
    if command == "evaluate":
        from .report.command import EvaluateParser

        return EvaluateParser()
    if command == "clm":
        from .clm import make_parser

        return grouped(make_parser())
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from .sft import SAMSFTConfig

    return grouped(TrlParser((ScriptArguments, SAMSFTConfig, ModelConfig, DatasetMixtureConfig), prog="hf-sam sft"))


def grouped(parser):
    """Show the fields of [`~hf_sam.SAMArguments`] in groups of their own in the `--help` of an argparse parser.

    Args:
        parser (`argparse.ArgumentParser`): e.g. an `HfArgumentParser`; changed in place and returned.
    """
    from .arguments import SAMArguments

    groups = {
        "sam_": parser.add_argument_group("sharpness-aware training"),
        "anneal_": parser.add_argument_group("shortened annealing"),
    }
    for source in parser._action_groups[:-2]:
        for action in [action for action in source._group_actions if action.dest in SAMArguments.__dataclass_fields__]:
            source._group_actions.remove(action)
            groups["sam_" if action.dest.startswith("sam_") else "anneal_"]._group_actions.append(action)
    return parser


def _launch(command: str, from_config: list[str], flags: list[str], argv: list[str]) -> int:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    launch = [*_switches(parser, from_config), *flags]
    if "--accelerate_config" in launch:
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        launch = resolve_accelerate_config_argument(launch)
    launch += ["--module", "hf_sam", command, *argv]
    parser.parse_args(launch)  # an unknown flag ends here
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launch]
    return subprocess.run(accelerate, env={**os.environ, _LAUNCHED: "1"}).returncode


def _launcher_flags() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {"--accelerate_config", *launch_command_parser()._option_string_actions}


def _switches(parser, flags: list[str]) -> list[str]:
    """`flags` in pairs of name and value, as YAML gives them, with `--switch True` as the plain `--switch`."""
    result = []
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        action = parser._option_string_actions.get(name)
        if value == "None":  # null in YAML
            continue
        if action is None or action.nargs != 0:
            result += [name, value]
        elif value.lower() in ("true", "yes", "1"):
            result.append(name)
    return result


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without `taken`, which are some of its elements in their order."""
    rest, taken = [], list(taken)
    for argument in argv:
        if taken and argument == taken[0]:
            taken.pop(0)
        else:
            rest.append(argument)
    return rest
