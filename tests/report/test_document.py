"""Reports as Markdown and as one page."""

import re

from hf_sam.report.document import Cell, Document
from hf_sam.runtime.markdown import code, markdown_table


def test_pictures_of_one_name_do_not_hide_each_other(tmp_path):
    document = Document("Title")
    for content, name in ((b"1", "random a/b"), (b"2", "random a b"), (b"3", "random_a_b")):
        document.figure(name, content, "caption")
    markdown, _ = document.write(tmp_path)
    names = [line.split("(")[1].rstrip(")") for line in markdown.read_text().splitlines() if line.startswith("![")]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"1", b"2", b"3"]


def test_names_cannot_break_a_table_or_a_page():
    table = markdown_table(["a|b", "c"], [["1\n2", "x"]])
    assert table.splitlines()[0].count(" | ") == 1
    assert len(table.splitlines()) == 3
    document = Document("<b>")
    document.table(["<i>"], [["<script>alert(1)</script>"]])
    document.text("`code` & <tag>")
    page = document.html()
    assert "<script>" not in page
    assert "<code>code</code> &amp; &lt;tag&gt;" in page


HOSTILE = ["_x", "$\\foo$", "a|b", "`c`", "<script>alert(1)</script>", "**b** ~~s~~", "[l](http://x)", "# h\n- i", "*"]


def test_hostile_names_are_shown_as_they_are():
    document = Document(" ".join(HOSTILE))
    for name in HOSTILE:
        document.heading(name)
        document.text(f"It is {code(name)}.")
        document.figure("picture", b"", name)
    document.table(HOSTILE, [HOSTILE])
    markdown, page = document.markdown(), document.html()
    assert "<script>" not in page
    # Without what was escaped and what is code, no markup is left in Markdown.
    bare = re.sub(r"`[^`]*`|\\.", "", markdown)
    assert not re.search(r"[$*<~]|(?<!\w)_|_(?!\w)|(?<!\!)\[l\]\(", bare)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table} == {len(HOSTILE) + 2}
    assert all(line.startswith(("#", "It is", "![", "|")) for line in markdown.splitlines() if line)


def test_columns_of_numbers_are_aligned_to_the_right():
    document = Document("Title")
    document.table(["run", "loss"], [["a", "2.5"], ["bb", Cell("-12.75 [-13, -12]", "better")], ["c", "missing"]])
    assert document.markdown().splitlines()[2:] == [
        "| run |                loss |",
        "| --- | ------------------: |",
        "| a   |                 2.5 |",
        "| bb  | -12.75 [-13, -12] ✓ |",
        "| c   |             missing |",
    ]
    page = document.html()
    assert '<td class="number" data-label="loss" data-mark="better">-12.75 [-13, -12] ✓</td>' in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_words_in_bold_and_code():
    document = Document("Title")
    document.points(["**less** `a**b**` & **more**"])
    assert "<li><strong>less</strong> <code>a**b**</code> &amp; <strong>more</strong></li>" in document.html()
    assert "- **less** `a**b**` & **more**" in document.markdown()
