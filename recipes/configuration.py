"""Settings of the recipes: YAML files that extend one another, and flags that win over them."""

import os
import sys
from pathlib import Path

from transformers import HfArgumentParser

from hf_sam.runtime.config import read_flags
from hf_sam.runtime.errors import UsageError, did_you_mean, raise_usage_errors, unknown_arguments

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
        raise_usage_errors(self)

    def parse(self, argv: list[str] | None = None) -> tuple:
        """An instance of each dataclass.

        Raises:
            ValueError: if a file cannot be read or holds what is no flag, or a flag is unknown, or a value is wrong.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        known, unknown = self.parse_known_args(argv)
        if unknown:
            raise unknown_arguments(unknown, self._option_string_actions)
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
                    near = did_you_mean(name, actions)
                    raise UsageError(f"{file} sets {name!r}, which is no setting of {self.prog}{near}")
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
        UsageError: if a file is missing, extends itself, or holds something else.
    """
    return _read(Path(file), ())


def _read(file: Path, above: tuple[Path, ...]) -> dict:
    if file.resolve() in above:
        raise UsageError(f"The config file {file} extends itself.")
    content = {name: _absolute(value, file.parent) for name, value in read_flags(file).items()}
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
