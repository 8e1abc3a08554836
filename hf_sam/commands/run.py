"""`hf-sam run SCRIPT`: run a training script with SAM in its trainers."""

import argparse
import os

from transformers import HfArgumentParser

from ..arguments import SAMArguments
from ..runtime.errors import UsageError, raise_usage_errors, unknown_arguments
from .help import group_sam_flags
from .script import run_script


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command: SAM flags, the script, and its arguments."""
    parser = raise_usage_errors(group_sam_flags(HfArgumentParser(SAMArguments, prog="hf-sam run")))
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="flags of the script, which may include SAM flags")
    return parser


def main(argv: list[str]) -> int:
    """Run the script as `__main__`; returns the exit status."""
    parser = make_parser()
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
