"""A report as a list of blocks, rendered as Markdown with picture files, or as one self-contained HTML file."""

import base64
import html
import re
from pathlib import Path

from ..runtime.markdown import markdown_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; white-space: nowrap; }
th { background: #f3f3f3; } td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } figcaption { color: #555; } code { background: #f3f3f3; }
"""


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
        """A paragraph; `code` in backticks is the only mark-up."""
        self._blocks.append(("text", text))

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """A table, if it has rows."""
        if rows:
            self._blocks.append(("table", header, rows))

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
        parts = [f"# {self.title}"]
        for kind, *content in self._blocks:
            if kind == "heading":
                parts.append(f"## {content[0]}")
            elif kind == "text":
                parts.append(content[0])
            elif kind == "table":
                parts.append(markdown_table(*content))
            else:
                name, _, caption = content
                parts.append(f"![{caption}]({name}.png)")
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
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
        )


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
