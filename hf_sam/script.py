"""Running a training script that knows nothing of hf-sam, with SAM.

No library is patched. What changes is the script's own namespace: wherever it imports or names a trainer or config
class (a name that ends in Trainer, TrainingArguments or Config), it gets `with_sam` of that class, as if somebody had
edited those lines. Code in other files keeps the plain classes.
"""

import ast
import logging
import os
import re
import sys
import types
from pathlib import Path

from transformers import Trainer, TrainingArguments

from .factory import with_sam

logger = logging.getLogger(__name__)

_ADOPT = "__hf_sam_adopt__"
# Attributes that may name a trainer or config class, as in `transformers.Trainer`; whether they do is seen at run time.
_CLASS_NAME = re.compile(r"(Trainer|TrainingArguments|Config)$")


def run_script(path: str, argv: list[str], **defaults) -> dict[str, str]:
    """Run the script at `path` as `__main__`, with `argv` as its command line.

    Args:
        path (`str`): a Python file.
        argv (`list[str]`): its arguments; the SAM flags are among those of the script's own parser.
        defaults: other defaults of the fields of [`SAMArguments`], for scripts that write their arguments down.

    Returns:
        `dict[str, str]`: the classes that were exchanged, by name, and what they became.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"There is no script {path!r} to run.")
    exchanged: dict[str, str] = {}
    kinds: set[str] = set()

    def adopt(value):
        if not isinstance(value, type) or not issubclass(value, Trainer | TrainingArguments):
            return value
        replacement = with_sam(value, **defaults) if issubclass(value, TrainingArguments) else with_sam(value)
        kinds.add("trainer" if issubclass(value, Trainer) else "config")
        if replacement is not value:
            exchanged[value.__name__] = replacement.__name__
        return replacement

    code = compile(_rewritten(source.read_bytes(), path), path, "exec")
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__dict__[_ADOPT] = adopt
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    # Classes of the script are pickled as those of `__main__`.
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before
    if not {"trainer", "config"} <= kinds:
        missing = " and ".join(sorted({"trainer", "config"} - kinds))
        logger.warning(
            f"{path} names no {missing} class that SAM could be given to, so SAM did not act in what it trained. "
            "Exchange the classes where they are named, with `hf_sam.with_sam`."
        )
    return exchanged


def _rewritten(source: bytes, path: str) -> ast.Module:
    """The program with every imported class, and every class named through a module, passed through `adopt`."""
    tree = _Rewriter().visit(ast.parse(source, path))
    return ast.fix_missing_locations(tree)


class _Rewriter(ast.NodeTransformer):
    def visit_ImportFrom(self, node):
        if node.module == "__future__" or any(alias.name == "*" for alias in node.names):
            return node
        names = [alias.asname or alias.name for alias in node.names]
        classes = [name for name, alias in zip(names, node.names, strict=True) if _CLASS_NAME.search(alias.name)]
        # On the line of the import, so that line numbers in a traceback stay those of the file.
        return [node, *(ast.copy_location(_assign(name), node) for name in classes)]

    def visit_match_case(self, node):
        # A pattern takes names only, no calls.
        node.guard = node.guard and self.visit(node.guard)
        node.body = [part for statement in node.body for part in _listed(self.visit(statement))]
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and _CLASS_NAME.search(node.attr):
            return ast.copy_location(_adopted(node), node)
        return node


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _adopted(expression: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(_ADOPT, ast.Load()), args=[expression], keywords=[])


def _assign(name: str) -> ast.Assign:
    return ast.Assign(targets=[ast.Name(name, ast.Store())], value=_adopted(ast.Name(name, ast.Load())))
