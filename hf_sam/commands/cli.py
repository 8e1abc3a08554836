"""The `hf-sam` command: `sft`, `clm`, `run` for any script, `evaluate` and `report`.

In the style of `trl sft`: flags of the command's own parser, `--config FILE` for a YAML file with more of them, and
whatever that parser does not know (`--num_processes 2`, `--accelerate_config FILE`) goes to `accelerate launch`, which
then starts the same command in every process. Without such flags the command runs in this process.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable

from ..runtime.errors import UsageError, did_you_mean, raising, unknown_arguments
from .help import grouped
from .reporting import DEBUG, run_command

_USAGE = """\
usage: hf-sam COMMAND [flags]

commands:
  sft             supervised fine-tuning: TRL's `sft` script with SAM
  clm             pretraining on plain text, from a checkpoint or from scratch
  run SCRIPT      any training script, with SAM in the trainers that it names; flags of SAM in front of SCRIPT are
                  defaults for scripts that do not parse flags (end a list or a switch with `--`)
  evaluate        forgetting, damage of quantization, sharpness, benchmarks of a base model and those made from it
  report DIR...   compare evaluations, the first of which is the reference

`hf-sam COMMAND --help` lists the flags, and `hf-sam --debug COMMAND` (or HF_SAM_DEBUG=1) shows the traceback of errors
that are otherwise told in one line. Start `run` on several processes with
`accelerate launch -m hf_sam run SCRIPT ...` or `torchrun -m hf_sam run SCRIPT ...`.
"""


# Commands, and the packages that they need, by extra.
_COMMANDS = {
    "sft": ("sft", ("trl", "datasets")),
    "clm": ("sft", ("trl", "datasets")),
    "run": (None, ()),
    "evaluate": ("eval", ("datasets", "scipy", "matplotlib")),
    "report": ("eval", ("datasets", "scipy", "matplotlib")),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (of the process when omitted).

    Returns:
        `int`: the exit status: 0, 1 if a measure failed, 2 after a mistake of the user, 130 after Ctrl-C, or what a
        launched process returned.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--debug"]:
        os.environ[DEBUG] = "1"  # for the processes that are launched, too
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    command, *rest = argv
    if command not in _COMMANDS:
        return run_command("hf-sam", lambda: _unknown_command(command))
    # The script of `run` is the user's own: its errors are shown as Python shows them.
    return run_command(f"hf-sam {command}", lambda: _run_command(command, rest), hosts=command != "run")


def _unknown_command(command: str) -> int:
    near = did_you_mean(command, _COMMANDS) or f"; the commands are {', '.join(_COMMANDS)}"
    raise UsageError(f"there is no command {command!r}{near}")


def _run_command(command: str, argv: list[str]) -> int:
    extra, packages = _COMMANDS[command]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed. Install it: pip install 'hf-sam[{extra}]'.")
    if command == "run":
        return _run(argv)
    if command == "report":
        from .report import report_main

        return report_main(argv)
    return _start(command, argv)


def _run(argv: list[str]) -> int:
    from ..arguments import SAMArguments
    from .script import run_script

    parser = _run_parser()
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        raise unknown_arguments(unknown, parser._option_string_actions)
    sam, rest = parser.parse_args_into_dataclasses(argv)
    if not os.path.isfile(rest.script):
        raise UsageError(f"there is no script {rest.script!r}")
    plain = SAMArguments()
    chosen = {name: value for name, value in vars(sam).items() if value != getattr(plain, name)}
    run_script(rest.script, rest.arguments, **chosen)
    return 0


def _run_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from ..arguments import SAMArguments

    parser = raising(grouped(HfArgumentParser(SAMArguments, prog="hf-sam run")))
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own flags, among them those of SAM")
    return parser


def _start(command: str, argv: list[str]) -> int:
    """Run a command in this process, or launch it in others if there are flags of the launcher."""
    from . import launch

    parser = raising(_parser(command))
    # Two arguments, as TRL's parser wants them.
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    config, unknown = _unknown(parser, argv)
    flags = list(parser._option_string_actions)
    for name in config:
        if f"--{name}" not in launch.launcher_flags():
            known = [flag.removeprefix("--") for flag in {*flags, *launch.launcher_flags()}]
            raise UsageError(f"the config file sets {name!r}, which is no flag{did_you_mean(name, known)}")
    if launch.is_launched():
        if unknown:
            raise unknown_arguments(unknown, flags)
    elif config or unknown:
        launch.check_flags(unknown, flags)
        return launch.launch(command, [*launch.as_flags(config), *unknown], _without(argv, unknown))
    return _program(command)(argv)


def _unknown(parser, argv: list[str]) -> tuple[dict, list[str]]:
    """What the parser does not know, in the file of `--config` and in `argv`; prints the help where asked to.

    The arguments are not built yet: in a process that only launches others, they would set up devices.
    """
    from ..runtime.config import read_flags

    flags, config = list(argv), {}
    if "--config" in flags:
        index = flags.index("--config")
        if index + 1 == len(flags):
            raise UsageError("argument --config: expected one argument")
        config = read_flags(flags[index + 1])
        del flags[index : index + 2]
        config.pop("env", None)  # for the process that trains
        unknown = {name.removeprefix("--") for name in parser.set_defaults_with_config(**config)[::2]}
        config = {name: value for name, value in config.items() if name in unknown}
    return config, parser.parse_known_args(flags)[1]


def _program(command: str) -> Callable[[list[str]], int]:
    """What runs in this process, and returns the exit status."""
    if command == "evaluate":
        from .evaluate import evaluate_main

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
    """TRL's script with SAM, and with data by name as in the other commands."""
    import datasets
    import trl
    import trl.scripts.sft

    from .script import load_script
    from .training_inputs import SFT_COLUMNS, load_training_data, parse_arguments

    script_args, args, model_args, mixture = parse_arguments(raising(_parser("sft")), argv)
    data = load_training_data(script_args, args, mixture, [*SFT_COLUMNS, args.dataset_text_field])
    script_args.dataset_train_split, script_args.dataset_test_split = "train", "test"

    def loaded(*_, **__) -> dict:
        return data

    script = load_script(trl.scripts.sft.__file__, {datasets.load_dataset: loaded, trl.get_dataset: loaded})
    script.main(script_args, args, model_args, mixture)


def _parser(command: str):
    """The parser of the program, with the flags of SAM in a group of their own in the help."""
    if command == "evaluate":
        from .evaluate import EvaluateParser

        return EvaluateParser()
    if command == "clm":
        from .clm import make_parser

        return grouped(make_parser())
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..sft import SAMSFTConfig

    return grouped(TrlParser((ScriptArguments, SAMSFTConfig, ModelConfig, DatasetMixtureConfig), prog="hf-sam sft"))


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without `taken`, which are some of its elements in their order."""
    rest, taken = [], list(taken)
    for argument in argv:
        if taken and argument == taken[0]:
            taken.pop(0)
        else:
            rest.append(argument)
    return rest
