"""YAML files of flags."""

from pathlib import Path

import yaml

from .errors import UsageError


def read_flags(file: str | Path) -> dict:
    """The flags that a YAML file sets, by name without dashes.

    Raises:
        UsageError: if the file is missing, is no YAML, or holds no mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The config file {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {file} cannot be read: it is no YAML ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"The config file {file} must hold a mapping of flags to values.")
    return content
