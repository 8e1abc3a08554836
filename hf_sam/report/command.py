"""The commands `hf-sam evaluate` and `hf-sam report`."""

import argparse
import sys
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from ..evaluation.processes import join_processes, rank_and_world
from ..evaluation.requirements import MeasurementError
from .comparison import write_comparison
from .pages import evaluation_report, write_report
from .results import Results
from .run import evaluate
from .settings import EvaluationArguments

# What the user can mend; anything else deserves its traceback.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError, MeasurementError, FloatingPointError)


class EvaluateParser(HfArgumentParser):
    """The parser of `hf-sam evaluate`, with `--config FILE` for a YAML file of flags; those of the command line win."""

    def __init__(self):
        super().__init__(EvaluationArguments, prog="hf-sam evaluate")
        self.add_argument("--config", help="YAML file with any of these flags; those of the command line win")

    def set_defaults_with_config(self, **config) -> list[str]:
        """Take what a config file holds as defaults; returns the names and values that are no flags of this parser."""
        actions = {action.dest: action for action in self._actions}
        rest = []
        for name, value in config.items():
            if name not in actions:
                rest += [f"--{name}", str(value)]
                continue
            if actions[name].nargs == "+" and not isinstance(value, list):
                value = [value]
            self.set_defaults(**{name: value})
        return rest


def evaluate_main(argv: list[str]) -> int:
    """Measure, write the record and the reports; returns the exit status."""
    parser = EvaluateParser()
    try:
        if config := parser.parse_args(argv).config:
            # What is no flag of this parser was for the launcher.
            parser.set_defaults_with_config(**read_config(config))
        flags = vars(parser.parse_args(argv))
        settings = EvaluationArguments(**{name: value for name, value in flags.items() if name != "config"})
        join_processes()
        logging.set_verbosity_error()
        record = evaluate(settings)
        if rank_and_world()[0] == 0:
            for path in write_report(record, settings.output):
                print(path)
            print(Path(settings.output) / "results.json")
    except _EXPECTED as error:
        print(f"hf-sam evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def read_config(path: str) -> dict:
    """The flags in a YAML file.

    Raises:
        ValueError: if it holds something else.
    """
    import yaml

    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"the config file {path} must hold a mapping of flags to values")
    return config


def report_main(argv: list[str]) -> int:
    """Write the report of one evaluation again, or compare several; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hf-sam report", description="Compare evaluations, the first of which is the reference."
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of hf-sam evaluate")
    parser.add_argument("--output", help="folder of the report (of one evaluation, its own; of several, comparison)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[],
        help="pretraining budget of each base: finds the inflection point",
    )
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.folders) == 1:
            folder = arguments.folders[0]
            paths = evaluation_report(Results.read(folder)).write(arguments.output or folder)
        else:
            paths = write_comparison(arguments.folders, arguments.output or "comparison", arguments.budgets)
    except _EXPECTED as error:
        print(f"hf-sam report: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0
