"""Real text without a network: every machine with the dependencies has it.

Pretraining text is the English of the docstrings of torch and transformers. The fine-tuning tasks are the grade-school
word problems of the reasoning-gym package, with their worked solutions, and the Python functions of torch and
transformers, without docstrings: the body is to be written after the signature.
"""

import ast
import importlib.util
import itertools
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..runtime.fingerprint import seed_of
from ..runtime.packages import require

CORPUS_PACKAGES = ("torch", "transformers")
SHORTEST_DOCSTRING = 200  # characters; shorter ones are mostly boilerplate
SHORTEST_FUNCTION = 100  # characters of the body
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
        documents = _of_all_files(docstrings)
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


def _of_all_files(function: Callable[[Path], list]) -> list:
    """What a function finds in each file of the packages."""
    files = [
        path
        for package in CORPUS_PACKAGES
        for path in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
    ]
    # Its workers end when this process does, also when it is killed; those of ProcessPoolExecutor wait forever.
    with multiprocessing.Pool() as pool:
        return list(itertools.chain.from_iterable(pool.map(function, files, chunksize=64)))


def _definitions(source: str) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, and the classes and functions in it at any depth; nothing if it is not valid Python."""
    try:
        pending = [ast.parse(source)]
    except SyntaxError:  # templates and test fixtures that are not meant to be imported
        return
    while pending:
        node = pending.pop()
        yield node
        pending.extend(
            child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )


def docstrings(path: Path) -> list[str]:
    """The long docstrings of one Python file."""
    source = path.read_text(encoding="utf-8", errors="replace")
    if '"""' not in source:
        return []
    found = map(ast.get_docstring, _definitions(source))
    return [text for text in found if text and len(text) >= SHORTEST_DOCSTRING]


def functions(path: Path) -> list[tuple[str, str]]:
    """The functions and methods of one Python file: signature, and body without docstrings.

    Those inside of a function are only part of it, so that no text is in two examples.
    """
    found = []
    for parent in _definitions(path.read_text(encoding="utf-8", errors="replace")):
        if isinstance(parent, ast.Module | ast.ClassDef):
            for node in parent.body:
                if isinstance(node, ast.FunctionDef) and (parts := _signature_and_body(node)) is not None:
                    found.append(parts)
    return found


def _signature_and_body(function: ast.FunctionDef) -> tuple[str, str] | None:
    """None for a function that is short, or that cannot be written as source again."""
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.decorator_list = []
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    head = ast.FunctionDef(function.name, function.args, [ast.Pass()], [], function.returns)
    try:
        signature = ast.unparse(ast.fix_missing_locations(head)).removesuffix("\n    pass")
        body = ast.unparse(ast.fix_missing_locations(function)).removeprefix(f"{signature}\n")
    except (ValueError, RecursionError):  # f-strings of newer versions; very long expressions
        return None
    return (signature, body) if len(body) >= SHORTEST_FUNCTION else None


def _fraction(document: str) -> float:
    return seed_of(document) / 2**56


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

    Raises:
        ValueError: if too few problems fit.
    """
    require("reasoning_gym", "The word problems of the toy preset")
    import reasoning_gym

    texts = (
        {
            "prompt": f"Question: {_one_line(problem['question'])}\nAnswer:",
            "completion": f" {_one_line(problem['metadata']['answer_cot'])}",
        }
        for problem in reasoning_gym.create_dataset("gsm_symbolic", size=4 * count, seed=seed)
    )
    return _that_fit(texts, tokenizer, count, length, "word problems")


def function_texts(tokenizer: PreTrainedTokenizerFast, count: int, length: int, seed: int) -> list[dict[str, str]]:
    """`count` functions, the signature as `prompt` and the body as `completion`, of at most `length` tokens together.

    Raises:
        ValueError: if too few functions fit.
    """
    # One for each body, because models of one family repeat theirs.
    distinct = {body: signature for signature, body in _of_all_files(functions)}
    shuffled = sorted(distinct, key=lambda body: seed_of(f"{seed} {body}"))
    texts = ({"prompt": f"{distinct[body]}\n", "completion": body} for body in shuffled)
    return _that_fit(texts, tokenizer, count, length, "functions")


def _that_fit(texts: Iterable[dict[str, str]], tokenizer, count: int, length: int, what: str) -> list[dict[str, str]]:
    """The first `count` texts of at most `length` tokens with the end token."""
    found, seen = [], 0
    for text in texts:
        seen += 1
        if sum(len(tokenizer(part)["input_ids"]) for part in text.values()) + 1 <= length:
            found.append(text)
        if len(found) == count:
            return found
    raise ValueError(
        f"Only {len(found)} of {seen} {what} fit into {length} tokens, and {count} are needed. Raise task_length, or "
        "ask for fewer."
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_toy_data(
    folder: Path,
    *,
    text_file: str | None,
    vocabulary: int,
    problems: int,
    functions: int,
    task_length: int,
    seed: int,
) -> None:
    """Write `train.jsonl`, `held_out.jsonl`, the tasks `problems.jsonl` and `functions.jsonl`, and `tokenizer`.

    Args:
        folder (`Path`): made if need be.
        text_file (`str`, *optional*): see [`load_corpus`].
        vocabulary (`int`): see [`train_tokenizer`].
        problems, functions (`int`): number of examples of each task; no file of a task that has none.
        task_length, seed (`int`): see [`problem_texts`] and [`function_texts`].

    Raises:
        ValueError: if there is too little text, or too few examples are short enough.
    """
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = load_corpus(text_file)
    tokenizer = train_tokenizer(train, vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    Dataset.from_dict({"text": train}).to_json(folder / "train.jsonl")
    Dataset.from_dict({"text": held_out}).to_json(folder / "held_out.jsonl")
    for name, count, texts in (("problems", problems, problem_texts), ("functions", functions, function_texts)):
        if count:
            Dataset.from_list(texts(tokenizer, count, task_length, seed)).to_json(folder / f"{name}.jsonl")
