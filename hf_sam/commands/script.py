"""Running a training script that knows nothing of hf-sam, with SAM.

No library is patched. What changes is the script's own namespace: wherever it imports or names a trainer or config
class (a name that ends in Trainer, TrainingArguments or Config), it gets `with_sam` of that class, as if somebody had
edited those lines. Parsers of its arguments get errors of one line. Code in other files keeps the plain classes.
"""

import argparse
import ast
import logging
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainingArguments

from ..factory import with_sam
from ..runtime.errors import raise_usage_errors

logger = logging.getLogger(__name__)

_ADOPT = "__hf_sam_adopt__"
# Attributes that may name a trainer or config class, as in `transformers.Trainer`; whether they do is seen at run time.
_CLASS_NAME = re.compile(r"(Trainer|TrainingArguments|Config|ArgumentParser|TrlParser)$")


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no script {path!r} to run.")
    adopt = _Adoption(defaults)
    main = types.ModuleType("__main__")
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    # Classes of the script are pickled as those of `__main__`.
    sys.modules["__main__"] = main
    try:
        _execute(path, main, adopt)
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before
    if not {"trainer", "config"} <= adopt.kinds:
        missing = " and ".join(sorted({"trainer", "config"} - adopt.kinds))
        logger.warning(
            f"{path} names no {missing} class that SAM could be given to, so SAM did not act in what it trained. "
            "Exchange the classes where they are named, with `hf_sam.with_sam`."
        )
    return adopt.exchanged


def load_script(path: str, functions: dict[Callable, Callable]) -> types.ModuleType:
    """The script at `path` as a module, of which nothing runs that stands under `if __name__ == "__main__"`.

    Args:
        path (`str`): a Python file.
        functions (`dict[Callable, Callable]`): functions that the script imports, and what it gets in their place.
    """
    module = types.ModuleType(Path(path).stem)
    _execute(path, module, _Adoption({}, functions))
    return module


class _Adoption:
    """What a script gets for the classes and functions that it names."""

    def __init__(self, defaults: dict, functions: dict[Callable, Callable] | None = None):
        self._defaults, self._functions = defaults, functions or {}
        self.exchanged: dict[str, str] = {}
        self.kinds: set[str] = set()

    @property
    def names(self) -> set[str]:
        """Names of the functions."""
        return {function.__name__ for function in self._functions}

    def __call__(self, value):
        if isinstance(value, types.FunctionType):
            return self._functions.get(value, value)
        if isinstance(value, type) and issubclass(value, argparse.ArgumentParser):
            return _with_short_errors(value)
        if not isinstance(value, type) or not issubclass(value, Trainer | TrainingArguments):
            return value
        config = issubclass(value, TrainingArguments)
        replacement = with_sam(value, **self._defaults) if config else with_sam(value)
        self.kinds.add("config" if config else "trainer")
        if replacement is not value:
            self.exchanged[value.__name__] = replacement.__name__
        return replacement


def _with_short_errors(parser: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """The class of a parser that raises what is wrong instead of printing its usage, some hundred lines of flags."""

    class Parser(parser):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise_usage_errors(self)

    Parser.__name__, Parser.__qualname__, Parser.__doc__ = parser.__name__, parser.__qualname__, parser.__doc__
    return Parser


def _execute(path: str, module: types.ModuleType, adopt: _Adoption) -> None:
    code = compile(_rewritten(Path(path).read_bytes(), path, adopt.names), path, "exec")
    module.__file__ = path
    module.__dict__[_ADOPT] = adopt
    exec(code, module.__dict__)


def _rewritten(source: bytes, path: str, functions: set[str]) -> ast.Module:
    """The program with every imported class, and every class named through a module, passed through `adopt`.

    So are the imported functions of some names.
    """
    tree = _Rewriter(functions).visit(ast.parse(source, path))
    return ast.fix_missing_locations(tree)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, functions: set[str]):
        self._functions = functions

    def visit_ImportFrom(self, node):
        if node.module == "__future__" or any(alias.name == "*" for alias in node.names):
            return node
        names = [alias.asname or alias.name for alias in node.names]
        adopted = [
            name
            for name, alias in zip(names, node.names, strict=True)
            if _CLASS_NAME.search(alias.name) or alias.name in self._functions
        ]
        # On the line of the import, so that line numbers in a traceback stay those of the file.
        return [node, *(ast.copy_location(_assign(name), node) for name in adopted)]

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
