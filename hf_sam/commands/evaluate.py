"""`hf-sam evaluate`: measure what a base model lost, and write the record and the report."""

import sys
from pathlib import Path

from transformers.utils import logging

from ..evaluation.dry_run import plan_text
from ..evaluation.results import Results
from ..evaluation.run import Evaluation, evaluate
from ..evaluation.settings import arguments_class
from ..report.pages import short_report, write_report
from ..report.trackers import check_trackers, log_results
from ..runtime.config import ConfigParser, DryRunArguments
from ..runtime.distributed import join_processes, rank_and_world, wait_for_everyone
from .launch import run_or_launch


def make_parser() -> ConfigParser:
    """The parser of `hf-sam evaluate`."""
    return ConfigParser((arguments_class(), DryRunArguments), prog="hf-sam evaluate")


def main(argv: list[str]) -> int:
    """Measure, here or in launched processes; returns the exit status."""
    return run_or_launch("evaluate", make_parser(), argv, measure)


def measure(argv: list[str]) -> int:
    """Measure in this process, and write the record and the reports.

    Returns:
        `int`: 0, or 1 if a measure failed: the others are there, and the report says which failed and why.
    """
    settings, run = make_parser().parse(argv, ignore_unknown=True)
    join_processes()
    logging.set_verbosity_error()
    check_trackers(settings.report_to)
    if run.dry_run:
        print(plan_text(Evaluation(settings, dry_run=True)))
        return 0
    record = evaluate(settings)
    if rank_and_world()[0] == 0:
        print(short_report(Results(record)).markdown())
        for path in write_report(record, settings.output):
            print(path)
        print(Path(settings.output) / "results.json")
        log_results(Results(record), settings.report_to, settings.output)
        print_failures(record)
    wait_for_everyone()  # a launcher ends all processes as soon as one returns 1
    return 1 if failed_parts(record) else 0


def failed_parts(record: dict) -> list[dict]:
    """The parts of a record that could not be measured; each has its reason in `error`."""
    return [part for part in record["parts"] if part.get("error")]


def print_failures(record: dict) -> None:
    """One line on standard error about what could not be measured, if there is something."""
    if failed := failed_parts(record):
        first = failed[0]
        what = " ".join(filter(None, (first["part"], "of", first["model"], first["variant"])))
        print(
            f"{record['name']}: {len(failed)} of {len(record['parts'])} measures failed, first {what}: "
            f"{' '.join(first['error'].split())} The report lists all; the same command tries them again.",
            file=sys.stderr,
        )
