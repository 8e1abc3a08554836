"""`hf-sam evaluate`: measure what a base model lost, and write the record and the report."""

import sys
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from ..evaluation.run import evaluate
from ..evaluation.settings import EvaluationArguments
from ..report.pages import write_report
from ..runtime.config import read_flags
from ..runtime.distributed import join_processes, rank_and_world
from ..runtime.errors import raise_usage_errors
from .launch import run_or_launch


class EvaluateParser(HfArgumentParser):
    """The parser of `hf-sam evaluate`, with `--config FILE` for a YAML file of flags; those of the command line win."""

    def __init__(self):
        super().__init__(EvaluationArguments, prog="hf-sam evaluate")
        self.add_argument("--config", help="YAML file with any of these flags; those of the command line win")
        raise_usage_errors(self)

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


def main(argv: list[str]) -> int:
    """Measure, here or in launched processes; returns the exit status."""
    return run_or_launch("evaluate", EvaluateParser(), argv, measure)


def measure(argv: list[str]) -> int:
    """Measure in this process, and write the record and the reports.

    Returns:
        `int`: 0, or 1 if a measure failed: the others are there, and the report says which failed and why.
    """
    parser = EvaluateParser()
    if config := parser.parse_args(argv).config:
        # What is no flag of this parser was for the launcher.
        parser.set_defaults_with_config(**read_flags(config))
    flags = vars(parser.parse_args(argv))
    settings = EvaluationArguments(**{name: value for name, value in flags.items() if name != "config"})
    join_processes()
    logging.set_verbosity_error()
    record = evaluate(settings)
    if rank_and_world()[0] == 0:
        for path in write_report(record, settings.output):
            print(path)
        print(Path(settings.output) / "results.json")
        tell_failures(record)
    return 1 if failed_parts(record) else 0


def failed_parts(record: dict) -> list[dict]:
    """The parts of a record that could not be measured; each has its reason in `error`."""
    return [part for part in record["parts"] if part.get("error")]


def tell_failures(record: dict) -> None:
    """One line on standard error about what could not be measured, if there is something."""
    if failed := failed_parts(record):
        first = failed[0]
        what = " ".join(filter(None, (first["part"], "of", first["model"], first["variant"])))
        print(
            f"{record['name']}: {len(failed)} of {len(record['parts'])} measures failed, first {what}: "
            f"{' '.join(first['error'].split())} The report lists all; the same command tries them again.",
            file=sys.stderr,
        )
