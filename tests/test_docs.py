"""Documents beside the README: their links, and what they say about the code."""

import re
from pathlib import Path

import pytest
from test_architecture import FACE, LAYERS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def links(document: Path) -> set[str]:
    return set(re.findall(r"\]\((?!http|#)([^)#\s]+)(?:#[\w-]+)?\)", document.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    assert not [link for link in links(document) if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    pattern = r"`((?:hf_sam|tests|recipes|docs|benchmarks)/[\w./-]+\.(?:py|md|yaml))`"
    named = set(re.findall(pattern, document.read_text(encoding="utf-8")))
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_the_architecture_has_each_package_in_its_picture_and_a_paragraph_about_it():
    picture = ARCHITECTURE.split("```")[1]
    assert re.findall(r"^ (\w+) ", picture, re.MULTILINE) == list(LAYERS)
    assert set(re.findall(r"^\*\*(\w+)\*\*", ARCHITECTURE, re.MULTILINE)) == set(LAYERS)
    for module in FACE:
        assert module in picture


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "face"])
def test_modules_that_a_paragraph_names_are_in_that_package(layer):
    paragraph = re.search(rf"^\*\*{layer}\*\*.*?(?=\n\n)", ARCHITECTURE, re.MULTILINE | re.DOTALL)[0]
    for name in re.findall(r"`([\w/]+\.py)`", paragraph):
        folder = ROOT / "hf_sam" / layer
        assert (folder / name).exists() or (folder.parent / name).exists() or list(folder.rglob(name)), name
