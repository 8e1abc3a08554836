"""Real text that is on any machine with the dependencies installed: no network, no hub.

    python recipes/toy_data.py --output_dir outputs/toy/data

Pretraining text is the English of the docstrings of torch and transformers; the fine-tuning task is the grade-school
word problems of the reasoning-gym package, with their worked solutions. Writes `train.jsonl` and `held_out.jsonl`
(text), `problems.jsonl` (prompts and completions), and a tokenizer.
"""

import ast
import hashlib
import importlib.util
import itertools
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from configuration import RecipeParser
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_sam.commands.reporting import command

CORPUS_PACKAGES = ("torch", "transformers")
SHORTEST_DOCSTRING = 200  # characters; shorter ones are mostly boilerplate
HELD_OUT_SHARE = 0.04


def load_corpus(text_file: str | None = None) -> tuple[list[str], list[str]]:
    """Training and held-out documents; the split depends on each document alone, so it is the same on all machines.

    Args:
        text_file (`str`, *optional*): a text file with documents separated by blank lines, instead of docstrings.

    Raises:
        ValueError: if there is too little text to train on.
    """
    if text_file is not None:
        documents = [part.strip() for part in re.split(r"\n\s*\n", Path(text_file).read_text(encoding="utf-8"))]
    else:
        files = [
            path
            for package in CORPUS_PACKAGES
            for path in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
        ]
        with ProcessPoolExecutor() as pool:
            documents = list(itertools.chain.from_iterable(pool.map(docstrings, files, chunksize=64)))
    documents = list(dict.fromkeys(document for document in documents if document))
    held_out = [document for document in documents if _fraction(document) < HELD_OUT_SHARE]
    train = [document for document in documents if _fraction(document) >= HELD_OUT_SHARE]
    if len(held_out) < 8 or sum(map(len, train)) < 50_000:
        raise ValueError(
            f"The corpus has {sum(map(len, train)):,} characters to train on and {len(held_out)} held-out documents, "
            f"{len(documents)} documents in all; it needs 50,000 characters and 8 held-out documents. Give --text_file "
            "a larger text, with its documents separated by blank lines."
        )
    return train, held_out


def docstrings(path: Path) -> list[str]:
    """The long docstrings of one Python file."""
    source = path.read_text(encoding="utf-8", errors="replace")
    if '"""' not in source:
        return []
    try:
        pending = [ast.parse(source)]
    except SyntaxError:  # templates and test fixtures that are not meant to be imported
        return []
    found = []
    while pending:
        node = pending.pop()
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST_DOCSTRING:
            found.append(text)
        pending.extend(
            child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )
    return found


def _fraction(document: str) -> float:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") / 2**32


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def problem_texts(tokenizer: PreTrainedTokenizerFast, count: int, length: int, seed: int) -> list[dict[str, str]]:
    """`count` word problems as `prompt` with a worked solution as `completion`, of at most `length` tokens together.

    Problems that do not fit are left out and replaced by the next ones.
    """
    import reasoning_gym

    texts = []
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=4 * count, seed=seed):
        text = {
            "prompt": f"Question: {_one_line(problem['question'])}\nAnswer:",
            "completion": f" {_one_line(problem['metadata']['answer_cot'])}",
        }
        if sum(len(tokenizer(part)["input_ids"]) for part in text.values()) + 1 <= length:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(
        f"Only {len(texts)} of {4 * count} word problems fit into {length} tokens, and {count} are needed. "
        "Raise the sequence length."
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass
class ToyDataArguments:
    """What is written where."""

    output_dir: str = field(default="outputs/toy/data", metadata={"help": "Where the files go."})
    text_file: str | None = field(
        default=None, metadata={"help": "Text to use instead of docstrings; blank lines end documents."}
    )
    vocabulary: int = field(default=512, metadata={"help": "Tokens of the tokenizer."})
    problems: int = field(default=1280, metadata={"help": "Number of word problems."})
    problem_length: int = field(default=288, metadata={"help": "Tokens of the longest word problem."})
    seed: int = field(default=42, metadata={"help": "Seed of the word problems."})


@command
def main(argv: list[str] | None = None) -> int:
    """Write the files; returns the exit status."""
    settings, _ = RecipeParser(ToyDataArguments, prog="toy_data.py").parse(argv)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = load_corpus(settings.text_file)
    tokenizer = train_tokenizer(train, settings.vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    Dataset.from_dict({"text": train}).to_json(folder / "train.jsonl")
    Dataset.from_dict({"text": held_out}).to_json(folder / "held_out.jsonl")
    problems = problem_texts(tokenizer, settings.problems, settings.problem_length, settings.seed)
    Dataset.from_list(problems).to_json(folder / "problems.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
