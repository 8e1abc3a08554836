"""`hf-sam toy-data`: the data of the preset `toy`, made of installed packages without a network.

Writes `train.jsonl` and `held_out.jsonl` (docstrings), `problems.jsonl` (word problems with solutions),
`functions.jsonl` (Python functions), and a tokenizer.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..experiments.toy_data import write_toy_data
from ..runtime.config import ConfigParser


@dataclass
class ToyDataArguments:
    """The size of the data, and where it goes."""

    output_dir: str = field(default="outputs/toy/data", metadata={"help": "Output folder."})
    text_file: str | None = field(
        default=None, metadata={"help": "Text to use instead of docstrings; blank lines separate documents."}
    )
    vocabulary: int = field(default=512, metadata={"help": "Size of the vocabulary of the tokenizer."})
    problems: int = field(default=1280, metadata={"help": "Number of word problems."})
    functions: int = field(default=0, metadata={"help": "Number of Python functions."})
    task_length: int = field(default=288, metadata={"help": "Tokens of the longest word problem or function."})
    seed: int = field(default=42, metadata={"help": "Chooses the word problems and the functions."})


def make_parser() -> ConfigParser:
    """The parser of the command."""
    return ConfigParser(ToyDataArguments, prog="hf-sam toy-data", description=__doc__.split("\n", 1)[0])


def main(argv: list[str]) -> int:
    """Write the files; returns the exit status."""
    (settings,) = make_parser().parse(argv)
    sizes = {name: value for name, value in vars(settings).items() if name != "output_dir"}
    write_toy_data(Path(settings.output_dir), **sizes)
    return 0
