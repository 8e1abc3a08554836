"""Markdown tables, and text that stays what it is in Markdown."""

import re
from collections.abc import Sequence

# What Markdown, HTML inside it, or mathematics would take for markup; underscores only at the ends of words.
_MARKUP = re.compile(r"[\\`*<$|~]|(?<!\w)_|_(?!\w)|\](?=\()|^(?=[#>]|\d+\. |[-+] )")


def literal_text(text: str) -> str:
    """A text that Markdown shows unchanged, on one line."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", " ".join(str(text).split()))


def code(name: str) -> str:
    """A name as code; backticks, which would end it, become apostrophes."""
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"


def markdown_table(header: list[str], rows: list[list[str]], numeric: Sequence[bool] = ()) -> str:
    """Format a Markdown table with aligned columns.

    Args:
        header, rows (`list[str]`, `list[list[str]]`): cells, shown unchanged.
        numeric (`Sequence[bool]`): whether each column is aligned to the right; none if omitted.
    """
    numeric = numeric or [False] * len(header)
    lines = [[literal_text(cell) for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, numeric, strict=True)]
    aligned = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in lines
    ]
    aligned.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)
