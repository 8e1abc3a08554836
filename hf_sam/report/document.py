"""A report as a list of blocks, rendered as Markdown with picture files, or as one self-contained HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from ..runtime.markdown import literal_text, markdown_table

# A cell that is a number, with an interval or not; or says that there is none.
_NUMBER = re.compile(r"[-+]?\d|not finite|missing$|reference$|-$|$")


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is marked as better or worse than the reference.

    Attributes:
        text (`str`): what it says.
        mark (`"better"`, `"worse"` or `""`): how it compares.
    """

    text: str
    mark: Literal["better", "worse", ""] = ""

    def __str__(self):
        return self.text + {"better": " ✓", "worse": " ✗", "": ""}[self.mark]


Row = Sequence[str | Cell]


class Document:
    """A report to which sections, text, tables and pictures are added.

    Args:
        title (`str`): its first heading.
    """

    def __init__(self, title: str):
        self.title = title
        self._blocks: list[tuple] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._blocks.append(("heading", text))

    def text(self, text: str) -> None:
        """A paragraph with `code` and **bold**. Names go through [`code`](~hf_sam.runtime.markdown.code)."""
        self._blocks.append(("text", text))

    def points(self, texts: Sequence[str]) -> None:
        """A list of sentences, with the markup of [`text`]."""
        self._blocks.append(("points", list(texts)))

    def table(self, header: list[str], rows: Sequence[Row]) -> None:
        """A table, if it has rows. Columns of numbers are aligned to the right."""
        if rows:
            self._blocks.append(("table", header, [list(row) for row in rows]))

    def figure(self, name: str, png: bytes, caption: str) -> None:
        """A picture; `name` is that of its file, to which a number is added if it is taken."""
        name = re.sub(r"[^\w-]+", "_", name)
        taken = {content[0] for kind, *content in self._blocks if kind == "figure"}
        free = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        self._blocks.append(("figure", free, png, caption))

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `report.md`, its pictures, and `report.html`; returns the paths of the two reports."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, *content in self._blocks:
            if kind == "figure":
                (folder / f"{content[0]}.png").write_bytes(content[1])
        markdown, page = folder / "report.md", folder / "report.html"
        markdown.write_text(self.markdown(), encoding="utf-8")
        page.write_text(self.html(), encoding="utf-8")
        return markdown, page

    def markdown(self) -> str:
        """The report as Markdown with links to picture files."""
        parts = [f"# {literal_text(self.title)}"]
        for kind, *content in self._blocks:
            if kind == "heading":
                parts.append(f"## {literal_text(content[0])}")
            elif kind == "text":
                parts.append(content[0])
            elif kind == "points":
                parts.append("\n".join(f"- {text}" for text in content[0]))
            elif kind == "table":
                header, rows = content
                parts.append(markdown_table(header, [[str(cell) for cell in row] for row in rows], numeric(rows)))
            else:
                name, _, caption = content
                parts.append(f"![{literal_text(caption)}]({name}.png)")
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The report as one HTML page that needs no other file."""
        title = html.escape(self.title)
        parts = [f"<h1>{title}</h1>"]
        for kind, *content in self._blocks:
            if kind == "heading":
                parts.append(f"<h2>{html.escape(content[0])}</h2>")
            elif kind == "text":
                parts.append(f"<p>{_inline(content[0])}</p>")
            elif kind == "points":
                parts.append("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in content[0]) + "</ul>")
            elif kind == "table":
                parts.append(_html_table(*content))
            else:
                _, png, caption = content
                data = base64.b64encode(png).decode()
                caption = html.escape(caption)
                parts.append(
                    f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
        body = "\n".join(parts)
        style = files("hf_sam.report").joinpath("style.css").read_text(encoding="utf-8")
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>\n{style}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
        )


def numeric(rows: Sequence[Row]) -> list[bool]:
    """Whether each column of a table holds numbers."""
    columns = list(zip(*rows, strict=True))
    return [
        all(_NUMBER.match(str(cell)) for cell in column) and any(re.match(r"[-+]?\d", str(cell)) for cell in column)
        for column in columns
    ]


def _html_table(header: list[str], rows: Sequence[Row]) -> str:
    kinds = ['class="number"' if right else "" for right in numeric(rows)]
    head = "".join(f"<th {kind}>{html.escape(cell)}</th>" for cell, kind in zip(header, kinds, strict=True))
    body = ""
    for row in rows:
        body += "<tr>"
        for cell, name, kind in zip(row, header, kinds, strict=True):
            marked = f' data-mark="{cell.mark}"' if isinstance(cell, Cell) and cell.mark else ""
            # The heading is repeated in each cell for narrow screens, where a row becomes a list.
            body += f'<td {kind} data-label="{html.escape(name)}"{marked}>{html.escape(str(cell))}</td>'
        body += "</tr>"
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    pieces = re.split(r"`([^`]*)`", html.escape(text))  # every second one is code
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", piece) for piece in pieces[::2]]
    codes = [f"<code>{piece}</code>" for piece in pieces[1::2]] + [""]
    return "".join(piece for pair in zip(bold, codes, strict=True) for piece in pair)
