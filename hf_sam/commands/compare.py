"""`hf-sam compare`: what fine-tuning and few bits cost each base model, and how much less than the first one.

A run is `NAME=BASE` or `NAME=BASE,FOLDER` with the `lr-*` folders of its sweep; the first run is the reference. All
other flags are those of `hf-sam evaluate`. Finished measurements are not repeated. One that fails, e.g. because the
training of a model diverged, is missing from the tables; the report of its run has the reason.
"""

import os
from pathlib import Path

from ..evaluation import EvaluationArguments, Results
from ..evaluation.dry_run import plan_text as hours_text
from ..evaluation.run import Evaluation
from ..evaluation.settings import arguments_class
from ..instruments.benchmarks import expand_tasks
from ..report import write_comparison, write_report
from ..report.tables import summary_document
from ..report.trackers import check_trackers, log_results
from ..runtime.config import ConfigParser, DryRunArguments
from ..runtime.dataset_specs import parse_spec
from ..runtime.distributed import join_processes, rank_and_world, wait_for_everyone
from ..runtime.run_record import FINISHED
from .evaluate import print_failures
from .launch import run_or_launch


def make_parser() -> ConfigParser:
    """The parser of the command: the flags of `hf-sam evaluate`, for all runs at once."""
    classes = (arguments_class(), DryRunArguments)
    parser = ConfigParser(classes, prog="hf-sam compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=BASE[,FOLDER]", help="the runs to compare")
    return parser


def main(argv: list[str]) -> int:
    """Measure and compare, here or in launched processes; returns the exit status."""
    return run_or_launch("compare", make_parser(), argv, compare)


def compare(argv: list[str]) -> int:
    """Measure all runs in this process and write their comparison, or print the plan; returns the exit status."""
    parser = make_parser()
    flags = vars(parser.parse_args(parser.prepare(argv, ignore_unknown=True)))
    runs, dry_run, output = flags.pop("runs"), flags.pop("dry_run"), Path(flags.pop("output"))
    flags.pop("config")
    if not runs:
        raise ValueError("Choose runs to compare: --runs NAME=BASE[,FOLDER] ..., the first of which is the reference.")
    if flags["quantized"]:
        raise ValueError(
            "--quantized belongs to one model, but these flags are those of all runs. Use hf-sam evaluate for each "
            "run, and hf-sam report."
        )
    settings = [settings_of_run(run, flags, output) for run in runs]
    if len({one.name for one in settings}) < len(settings):
        raise ValueError(f"--runs {' '.join(runs)}: two runs have the same name.")
    if dry_run:
        print(plan_text(settings))
        if all(os.path.isdir(parse_spec(model)[1]) for one in settings for model in (one.base, *one.tuned)):
            print("\n" + "\n\n".join(hours_text(Evaluation(one, dry_run=True)) for one in settings))
        return 0
    join_processes()
    check_trackers(settings[0].report_to)
    # All of them before any is measured, so that a mistake in the last one is reported at once.
    evaluations = [Evaluation(one) for one in settings]
    records = [one.run() for one in evaluations]
    if rank_and_world()[0] == 0:
        for one, record in zip(settings, records, strict=True):
            write_report(record, one.output)
            log_results(Results(record), one.report_to, one.output)
            print_failures(record)
        if len(settings) > 1:
            _, summary = write_comparison([one.output for one in settings], output / "comparison")
            print(summary_document(summary).markdown())
        print(f"Reports are in {output}.")
    wait_for_everyone()
    return 0


def settings_of_run(run: str, flags: dict, output: Path) -> EvaluationArguments:
    """The evaluation of one run.

    Args:
        run (`str`): `NAME=BASE` or `NAME=BASE,FOLDER`.
        flags (`dict`): settings of all runs.
        output (`Path`): the results go to a folder in it.

    Raises:
        ValueError: if `run` has another form, or the folder holds no finished run.
    """
    name, equals, places = run.partition("=")
    base, _, sweep = places.partition(",")
    if not (name and equals and base):
        raise ValueError(f"--runs {run!r} is not of the form NAME=BASE or NAME=BASE,FOLDER.")
    tuned = list(flags["tuned"])
    if sweep:
        found = sorted(Path(sweep).glob("lr-*"), key=lambda path: float(path.name.removeprefix("lr-")))
        tuned += [str(path) for path in found if (path / FINISHED).exists()]
        if not tuned:
            raise ValueError(f"--runs {run!r}: {sweep} holds no finished run lr-* of a sweep.")
    own = {"base": base, "tuned": tuned, "name": name, "output": str(output / name)}
    return EvaluationArguments(**{**flags, **own})


def plan_text(settings: list[EvaluationArguments]) -> str:
    """How much will be measured."""
    lines = []
    for one in settings:
        models = 1 + len(one.tuned)
        variants = models * (1 + len(one.quantize))
        losses = variants * (len(one.data) + len(one.task_data))
        benchmarks = variants * len(expand_tasks(one.benchmarks))
        size = sum(path.stat().st_size for path in Path(one.base).glob("*.safetensors"))
        weights = f"{size / 2**30:.1f} GiB of weights, and as much again while rounding" if size else "weights"
        lines.append(
            f"{one.name}: {models} models, {losses} held-out losses of up to {one.max_documents} documents, "
            f"{benchmarks} benchmark runs; {weights}, on one device."
        )
    return "\n".join(lines)
