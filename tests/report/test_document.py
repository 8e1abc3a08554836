"""Reports as Markdown and as one page."""

from hf_sam.report.document import Document
from hf_sam.runtime.markdown import markdown_table


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
