"""Config files, and the parser of every command that reads them.

A config file is YAML and sets the flags of a command by name. With `extends: FILE` (or a list of files), a file holds
only the difference from another one: mappings merge key by key, lists and values replace, null removes what the other
file sets. Paths that begin with `./` or `../` are relative to the file that they stand in. Of several files after
`--config`, each extends the ones before it; flags on the command line win over all files.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .errors import UsageError, did_you_mean, raise_usage_errors, unknown_arguments

EXTENDS = "extends"


@dataclass
class DryRunArguments:
    """The flag of commands that can print what they would do."""

    dry_run: bool = field(default=False, metadata={"help": "Print what the command would do and need, and exit."})


class ConfigParser(HfArgumentParser):
    """`HfArgumentParser` with `--config FILE...`, whose errors are [`UsageError`]s.

    A file may also set environment variables: `env: {NAME: VALUE}`. `--dry_run` ([`DryRunArguments`]) implies
    `--use_cpu`: a plan can be made on another machine than the one it is for.

    Args:
        dataclass_types: as in [`~transformers.HfArgumentParser`].
        kwargs: for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types=(), **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.add_argument("--config", nargs="+", default=[], help="YAML files with flags; the later win")
        raise_usage_errors(self)

    def parse(self, argv: Sequence[str] | None = None, *, ignore_unknown: bool = False) -> tuple:
        """An instance of each dataclass, from config files and flags.

        Args:
            argv (`Sequence[str]`, *optional*): the command line; that of the process when omitted.
            ignore_unknown (`bool`): ignore names in config files that are not flags of this parser, for a process whose
                launcher has read them.

        Raises:
            UsageError: if a flag or a name in a file is unknown, or a file cannot be read.
            ValueError: if a value in a file has the wrong type.
        """
        flags = self.prepare(sys.argv[1:] if argv is None else argv, ignore_unknown=ignore_unknown)
        known, rest = self.parse_known_args(flags)
        if rest:
            raise unknown_arguments(rest, self._option_string_actions)
        if getattr(known, "dry_run", False) and hasattr(known, "use_cpu"):
            flags = [*flags, "--use_cpu", "true"]
        *parsed, _ = self.parse_args_into_dataclasses(flags)  # without the namespace of --config
        return tuple(parsed)

    def prepare(self, argv: Sequence[str], *, ignore_unknown: bool = False) -> list[str]:
        """Make the settings in config files the defaults of the flags; returns the command line without the files.

        Args and errors are those of [`parse`].
        """
        files, flags = self.split(argv)
        unknown = self.load(files)
        if unknown and not ignore_unknown:
            raise self.unknown_setting(unknown)
        return flags

    def split(self, argv: Iterable[str]) -> tuple[list[str], list[str]]:
        """The files of `--config`, and the command line without them."""
        parser = raise_usage_errors(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        parser.add_argument("--config", nargs="+", default=[], action="extend")
        known, rest = parser.parse_known_args(list(argv))
        return known.config, rest

    def load(self, files: Sequence[str]) -> dict[str, tuple[str, object]]:
        """Make the settings in config files the defaults of the flags.

        Returns:
            `dict`: the settings that are not flags of this parser, by name: the file, and the value.
        """
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        settings, unknown = {}, {}
        for file in files:
            content = read_config(file)
            os.environ.update({name: str(value) for name, value in _environment(content, file).items()})
            for name in content.keys() - actions.keys():
                unknown[name] = (file, content.pop(name))
            converted = {name: _converted(value, actions[name], f"{file}: {name}") for name, value in content.items()}
            settings = merge(settings, converted)
        self.set_defaults(**settings)
        return unknown

    def unknown_setting(self, unknown: dict[str, tuple[str, object]], also_known: Iterable[str] = ()) -> UsageError:
        """The error about the first of the settings that [`load`] returned."""
        name, (file, _) = next(iter(unknown.items()))
        known = {action.dest for action in self._actions} | set(also_known)
        return UsageError(f"{file} sets {name!r}, which is not a setting of {self.prog}{did_you_mean(name, known)}")


def _environment(content: dict, file: str) -> dict:
    environment = content.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise UsageError(f"{file}: env must be a mapping of environment variables to values.")
    return environment


def _converted(value, action: argparse.Action, where: str):
    """A value as the parser makes it of text. YAML reads 2e-5 as text, and argparse converts a text, but no list."""
    if value is None:
        return None
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        try:
            return [action.type(one) if isinstance(one, str) and action.type else one for one in values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} is not a list of values of the right type ({error}).") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{where}: {value!r} must be one of {', '.join(map(str, action.choices))}.")
    return value


def read_config(file: str | Path) -> dict:
    """The content of a config file, merged with the files that it extends.

    Raises:
        UsageError: if a file is missing, is not a YAML mapping, or extends itself.
    """
    return _read(Path(file), ())


def _read(file: Path, above: tuple[Path, ...]) -> dict:
    if file.resolve() in above:
        raise UsageError(f"The config file {file} extends itself.")
    content = _read_yaml(file)
    bases = content.pop(EXTENDS, None) or []
    content = _relative_to(file.parent, content)
    settings = {}
    for base in bases if isinstance(bases, list) else [bases]:
        settings = merge(settings, _read(file.parent / base, (*above, file.resolve())))
    return merge(settings, content)


def _read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The config file {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {file} is not valid YAML: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"The config file {file} must hold a mapping of flags to values.")
    return content


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes`: mappings merge key by key, and null removes what `base` has.

    A null that removes nothing stays: for a flag it is None.
    """
    result = dict(base)
    for name, value in changes.items():
        if value is None and name in base:
            del result[name]
        elif isinstance(value, dict) and isinstance(base.get(name), dict):
            result[name] = merge(base[name], value)
        else:
            result[name] = value
    return result


def _relative_to(folder: Path, value):
    """A value with all paths that begin with ./ or ../ relative to a folder."""
    if isinstance(value, list):
        return [_relative_to(folder, one) for one in value]
    if isinstance(value, dict):
        return {name: _relative_to(folder, one) for name, one in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        path = (folder / value).resolve()
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return value
