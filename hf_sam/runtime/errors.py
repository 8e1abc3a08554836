"""Errors that are the user's to mend, and argument parsers that raise them."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence


class UsageError(ValueError):
    """A command line or a config file that cannot be understood; the message says what to change."""


class MeasurementError(RuntimeError):
    """A measurement that could not be made; its message says why, and what to do."""


def unknown_arguments(unknown: Sequence[str], known: Iterable[str]) -> UsageError:
    """The error about arguments that a command does not know, with the flag that was probably meant."""
    first = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
    name = first.partition("=")[0]
    return UsageError(f"unrecognized argument {name}{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`. Did you mean NAME?`, or nothing if no known name is like it."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f". Did you mean {close[0]}?" if close else ""


def raise_usage_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, which now raises [`UsageError`] instead of printing its usage and ending the process."""

    def error(message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            raise unknown_arguments(unknown.split(), parser._option_string_actions)
        # Instead of dozens of choices, the one that was probably meant.
        if choice := re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message):
            message = choice[1] + (
                did_you_mean(choice[2], re.findall(r"[\w.-]+", choice[3])) or message[choice.end(1) :]
            )
        raise UsageError(message)

    parser.error = error
    return parser
