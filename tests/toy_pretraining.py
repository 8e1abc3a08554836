"""Documents on disk, and how tests read them back."""

import json
import random
from pathlib import Path

import numpy as np
from toy_trl import WORDS


def write_documents(folder: Path, files: int = 3, documents: int = 40, seed: int = 0, longest: int = 30) -> str:
    """Files of documents of words, some of them empty; returns a pattern of the files."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [
            json.dumps({"text": " ".join(generator.choices(WORDS, k=generator.choice([0, 1, *range(2, longest)])))})
            for _ in range(documents)
        ]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "*.jsonl")


def read_documents(pattern: str) -> list[list[str]]:
    """Texts of each file."""
    files = sorted(Path(pattern).parent.glob("*.jsonl"))
    return [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


def tokens_of(texts: list[str], tokenizer) -> list[int]:
    """The tokens of documents end to end, by the definition."""
    found, vocabulary = [], tokenizer.get_vocab()
    for text in texts:
        if ids := [vocabulary[word] for word in text.split()]:
            found += [*ids, tokenizer.eos_token_id]
    return found


def ids_of(rows) -> list[int]:
    """The tokens of packed rows that are not padding."""
    return [token for row in rows for token in row["input_ids"][: real_length(row)].tolist()]


def real_length(row) -> int:
    """Tokens of a row before its padding, which is token 0 here."""
    nonzero = np.flatnonzero(row["input_ids"].numpy())
    return int(nonzero[-1]) + 1 if len(nonzero) else 0
