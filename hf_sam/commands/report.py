"""`hf-sam report`: compare evaluations.

One evaluation is reported alone. The folder of a comparison, whose evaluations may be elsewhere, is shown from its
`summary.json`.
"""

import argparse
from pathlib import Path

from ..evaluation.results import Results
from ..report.comparison import write_comparison
from ..report.document import Document
from ..report.methods import SEED_PATTERN
from ..report.pages import evaluation_report, short_report
from ..report.tables import summary_document, verdict_document
from ..runtime.disk import read_json
from ..runtime.errors import raise_usage_errors


def make_parser() -> argparse.ArgumentParser:
    """The parser of `hf-sam report`."""
    parser = argparse.ArgumentParser(
        prog="hf-sam report", description="Compare evaluations, the first of which is the reference."
    )
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="output folders of hf-sam evaluate, or that of one comparison"
    )
    parser.add_argument("--output", help="folder of the report (of one evaluation, its own; of several, comparison)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[],
        help="pretraining budget of each base: finds the inflection point",
    )
    parser.add_argument(
        "--seed_pattern",
        default=SEED_PATTERN,
        metavar="REGEX",
        help="groups evaluations over training seeds by their names: a regular expression with the groups `method` and "
        "`seed`; default: names such as sam-seed-3",
    )
    return parser


def main(argv: list[str]) -> int:
    """Write the report of one evaluation again, or compare several; returns the exit status."""
    arguments = raise_usage_errors(make_parser()).parse_args(argv)
    folder = arguments.folders[0]
    if len(arguments.folders) == 1 and _holds_comparison(folder):
        document = read_comparison(folder)
        paths = document.write(arguments.output) if arguments.output else []
        print(document.markdown())
    elif len(arguments.folders) == 1:
        document = evaluation_report(Results.read(folder))
        paths = document.write(arguments.output or folder)
        print(short_report(Results.read(folder)).markdown())
    else:
        output = arguments.output or "comparison"
        paths, summary = write_comparison(arguments.folders, output, arguments.budgets, arguments.seed_pattern)
        print(verdict_document(summary).markdown())
    for path in paths:
        print(path)
    return 0


def _holds_comparison(folder: str) -> bool:
    return (Path(folder) / "summary.json").is_file() and not (Path(folder) / "results.json").exists()


def read_comparison(folder: str | Path) -> Document:
    """The tables of a comparison, from its `summary.json`.

    Raises:
        ValueError: if the file is damaged, or of another version of this library.
    """
    path = Path(folder) / "summary.json"
    try:
        return summary_document(read_json(path))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the summary of a comparison by this version ({error!r}). Compare its evaluations "
            "again."
        ) from error
