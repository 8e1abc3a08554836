"""Run an unmodified training script with SAM.

No library is patched. Only the code of the script is rewritten: each trainer or config class that it imports or refers
to (a name that ends in Trainer, TrainingArguments or Config) is replaced by `with_sam` of that class, and its argument
parsers report errors in one line. Code in other files keeps the original classes.
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

_REPLACE = "__hf_sam_replace__"
# Names that may refer to a class to replace, as in `transformers.Trainer`; the class is checked at run time.
_CLASS_NAME = re.compile(r"(Trainer|TrainingArguments|Config|ArgumentParser|TrlParser)$")


def run_script(path: str, argv: list[str], **defaults) -> dict[str, str]:
    """Run the script at `path` as `__main__`, with `argv` as its command line.

    Args:
        path (`str`): a Python file.
        argv (`list[str]`): its arguments. If the script parses them into a replaced config class, it accepts SAM flags.
        defaults: defaults for fields of [`SAMArguments`], for scripts that do not parse arguments.

    Returns:
        `dict[str, str]`: names of the replaced classes, and of their replacements.

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no script {path!r} to run.")
    replacer = _Replacer(defaults)
    main = types.ModuleType("__main__")
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    # Classes of the script are pickled as classes of `__main__`.
    sys.modules["__main__"] = main
    try:
        _execute(path, main, replacer)
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before
    if not {"trainer", "config"} <= replacer.kinds:
        missing = " and ".join(sorted({"trainer", "config"} - replacer.kinds))
        logger.warning(
            f"{path} names no {missing} class that SAM can be added to, so SAM did not act. Use `hf_sam.with_sam` in "
            "the code that refers to these classes."
        )
    return replacer.replaced


def load_script(path: str, functions: dict[Callable, Callable]) -> types.ModuleType:
    """Load the script at `path` as a module with SAM; code under `if __name__ == "__main__"` is not run.

    Args:
        path (`str`): a Python file.
        functions (`dict[Callable, Callable]`): functions that the script imports, and their replacements.
    """
    module = types.ModuleType(Path(path).stem)
    _execute(path, module, _Replacer({}, functions))
    return module


class _Replacer:
    """Replaces classes and functions that a script refers to.

    Attributes:
        replaced (`dict[str, str]`): names of the replaced classes, and of their replacements.
        kinds (`set[str]`): the kinds of classes seen so far: `"trainer"`, `"config"`.
    """

    def __init__(self, defaults: dict, functions: dict[Callable, Callable] | None = None):
        self._defaults, self._functions = defaults, functions or {}
        self.replaced: dict[str, str] = {}
        self.kinds: set[str] = set()

    @property
    def names(self) -> set[str]:
        """Names of the functions to replace."""
        return {function.__name__ for function in self._functions}

    def __call__(self, value):
        if isinstance(value, types.FunctionType):
            return self._functions.get(value, value)
        if isinstance(value, type) and issubclass(value, argparse.ArgumentParser):
            return _raising_usage_errors(value)
        if not isinstance(value, type) or not issubclass(value, Trainer | TrainingArguments):
            return value
        config = issubclass(value, TrainingArguments)
        replacement = with_sam(value, **self._defaults) if config else with_sam(value)
        self.kinds.add("config" if config else "trainer")
        if replacement is not value:
            self.replaced[value.__name__] = replacement.__name__
        return replacement


def _raising_usage_errors(parser: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """Subclass of a parser that raises usage errors instead of printing its usage, which may be hundreds of lines."""

    class Parser(parser):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise_usage_errors(self)

    Parser.__name__, Parser.__qualname__, Parser.__doc__ = parser.__name__, parser.__qualname__, parser.__doc__
    return Parser


def _execute(path: str, module: types.ModuleType, replacer: _Replacer) -> None:
    code = compile(_rewrite(Path(path).read_bytes(), path, replacer.names), path, "exec")
    module.__file__ = path
    module.__dict__[_REPLACE] = replacer
    exec(code, module.__dict__)


def _rewrite(source: bytes, path: str, functions: set[str]) -> ast.Module:
    """Parse a program, and wrap its references to classes and to the given functions in calls of the replacer."""
    tree = _Rewriter(functions).visit(ast.parse(source, path))
    return ast.fix_missing_locations(tree)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, functions: set[str]):
        self._functions = functions

    def visit_ImportFrom(self, node):
        if node.module == "__future__" or any(alias.name == "*" for alias in node.names):
            return node
        names = [alias.asname or alias.name for alias in node.names]
        replaced = [
            name
            for name, alias in zip(names, node.names, strict=True)
            if _CLASS_NAME.search(alias.name) or alias.name in self._functions
        ]
        # On the line of the import, so that line numbers in tracebacks do not change.
        return [node, *(ast.copy_location(_assign(name), node) for name in replaced)]

    def visit_match_case(self, node):
        # The pattern is not visited, because it cannot contain calls.
        node.guard = node.guard and self.visit(node.guard)
        node.body = [part for statement in node.body for part in _listed(self.visit(statement))]
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and _CLASS_NAME.search(node.attr):
            return ast.copy_location(_wrap(node), node)
        return node


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _wrap(expression: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(_REPLACE, ast.Load()), args=[expression], keywords=[])


def _assign(name: str) -> ast.Assign:
    return ast.Assign(targets=[ast.Name(name, ast.Store())], value=_wrap(ast.Name(name, ast.Load())))
