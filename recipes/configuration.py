"""Settings of the recipes: YAML files that extend one another, and flags that win over them."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import HfArgumentParser

import hf_sam

EXTENDS = "extends"


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with `--config FILE...` and `--dry_run`.

    A file holds flags and their values, and `extends: FILE` what it differs from; a value of null takes a setting
    out. Of several files the later win, and the command line over all of them. Paths that begin with `./` or `../` are
    relative to the file that they stand in.
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.add_argument("--config", nargs="+", default=[], help="YAML files with flags; the later win")
        self.add_argument("--dry_run", "--dry-run", action="store_true", help="tell what it takes, and exit")

    def parse(self, argv: list[str] | None = None) -> tuple:
        """An instance of each dataclass.

        Raises:
            ValueError: if a file cannot be read or holds what is no flag, or a value is wrong.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        known = self.parse_known_args(argv)[0]
        self.set_defaults(**self.values(known.config))
        if known.dry_run and hasattr(known, "use_cpu"):
            argv += ["--use_cpu", "true"]  # a plan can be made without the machine that it is for
        *parsed, _ = self.parse_args_into_dataclasses(argv)  # without the namespace of --config
        return *parsed, known.dry_run

    def values(self, files: list[str]) -> dict:
        """What files set, as the parser wants it."""
        actions = {action.dest: action for action in self._actions}
        found = {}
        for file in files:
            for name, value in read_config(file).items():
                if name not in actions or name in ("config", "help", "dry_run"):
                    raise ValueError(f"{file} sets {name!r}, which is no setting of {self.prog or 'this recipe'}.")
                found[name] = _converted(value, actions[name], f"{file}: {name}")
        return found


def _converted(value, action, where: str):
    """YAML reads 2e-5 as text; argparse converts a text, but not those in a list."""
    if action.nargs == "+" and value is not None:
        values = value if isinstance(value, list) else [value]
        try:
            return [action.type(one) if isinstance(one, str) and action.type else one for one in values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} is no list of values of the right kind ({error}).") from error
    if action.choices is not None and value is not None and value not in action.choices:
        raise ValueError(f"{where}: {value!r} is none of {', '.join(map(str, action.choices))}.")
    return value  # argparse converts a text


def read_config(file: str | Path) -> dict:
    """What a file sets, with what it extends.

    Raises:
        ValueError: if a file is missing or holds something else.
    """
    return _read(Path(file), ())


def _read(file: Path, above: tuple[Path, ...]) -> dict:
    if file.resolve() in above:
        raise ValueError(f"{file} extends itself.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The config file {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The config file {file} must hold a mapping of flags to values.")
    content = {name: _absolute(value, file.parent) for name, value in content.items()}
    bases = content.pop(EXTENDS, [])
    values = {}
    for base in bases if isinstance(bases, list) else [bases]:
        values = merged(values, _read(file.parent / base, (*above, file.resolve())))
    return merged(values, content)


def merged(base: dict, changes: dict) -> dict:
    """`base` with `changes`, mapping by mapping; what is null in `changes` is taken out."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        result[name] = merged(base[name], value) if both else value
    return {name: value for name, value in result.items() if value is not None}


def _absolute(value, folder: Path):
    if isinstance(value, list):
        return [_absolute(one, folder) for one in value]
    if isinstance(value, dict):
        return {name: _absolute(one, folder) for name, one in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        path = (folder / value).resolve()
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return value


def told(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """A `main` whose errors of ours are told in a line; any other deserves its traceback."""

    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError, ImportError) as error:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
            ours = (Path(hf_sam.__file__).resolve().parent, Path(__file__).resolve().parent)
            if not any(folder in raised_in.parents for folder in ours):
                raise
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            return 1

    return wrapped
