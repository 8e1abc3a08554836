"""The layers of hf_sam: each package imports from those below it only, also inside functions."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_sam"

# From the top down. Modules that stand beside each other in hf_sam itself, between two packages, are one layer, `face`.
LAYERS = (
    "commands",
    "experiments",
    "finetuning",
    "report",
    "evaluation",
    "baselines",
    "pretraining",
    "planning",
    "face",
    "quantizers",
    "instruments",
    "statistics",
    "step",
    "runtime",
)
FACE = ("arguments", "configs", "factory", "history", "model_card", "records", "schedule", "sft", "trainer")
# The package itself, which is lazy, and what `python -m hf_sam` runs.
ENTRANCES = ("__init__", "__main__")


@functools.cache
def modules() -> dict[str, Path]:
    """Files by dotted name below hf_sam; a package is its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Modules of hf_sam that a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "hf_sam":
            base = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("hf_sam.") for a in node.names if a.name.startswith("hf_sam.")}
            continue
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in known else ".".join(base) or "__init__")
    return found


def layer(name: str) -> str:
    first = name.partition(".")[0]
    return "face" if first in FACE else first


MODULES = [name for name in modules() if name not in ENTRANCES]


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    here = LAYERS.index(layer(name))
    up = [other for other in imports(name, modules()[name]) - {"__init__"} if LAYERS.index(layer(other)) < here]
    assert not up


def test_there_is_no_import_circle():
    graph = {name: imports(name, path) & set(MODULES) for name, path in modules().items() if name not in ENTRANCES}
    # A module needs the package that it is in, which imports it: that is how packages work, and no circle of ours.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph.items()}
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] <= done]:
        done |= set(ready)
    assert done == set(graph)


def test_only_the_backends_and_the_plumbing_know_deepspeed_and_fsdp():
    """Identifiers, attributes and imports of all other code; what a message says to a user may name them."""
    found = []
    for name, path in modules().items():
        if name.startswith(("step.backends", "runtime")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
            if any(
                isinstance(w, str) and re.search(r"deepspeed|fsdp|dtensor|torch\.distributed", w.lower()) for w in words
            ):
                found.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert not found


@pytest.mark.parametrize(
    ("name", "upper"),
    [("pretraining", ("instruments", "evaluation", "report")), ("evaluation", ("report",)), ("step", ("trainer",))],
)
def test_a_package_loads_nothing_that_it_does_not_need(name, upper):
    """What a fresh interpreter has loaded afterwards, through other packages too."""
    loads = f"import sys, hf_sam.{name}; print(*(m for m in sys.modules if m.startswith('hf_sam.')))"
    loaded = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout.split()
    assert f"hf_sam.{name}" in loaded
    assert not [module for module in loaded if module.split(".")[1] in upper]


def test_no_file_is_long():
    folders = ("hf_sam", "recipes", "tests", "benchmarks")
    files = [path for folder in folders for path in (PACKAGE.parent / folder).rglob("*.py")]
    assert not [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
