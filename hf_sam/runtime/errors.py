"""Errors that the user can fix, and argument parsers that raise them."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence


class UsageError(ValueError):
    """Invalid command line or config file; the message says what to change."""


class MeasurementError(RuntimeError):
    """A measurement failed; the message gives the reason and the remedy."""


def unknown_arguments(unknown: Sequence[str], known: Iterable[str]) -> UsageError:
    """Make the error for unknown arguments of a command; suggests the closest known flag."""
    first = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
    name = first.partition("=")[0]
    return UsageError(f"unrecognized argument {name}{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`. Did you mean NAME?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f". Did you mean {close[0]}?" if close else ""


def raise_usage_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser raise [`UsageError`] instead of printing its usage and exiting; returns the parser."""

    def error(message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            raise unknown_arguments(unknown.split(), parser._option_string_actions)
        # Suggest the closest choice instead of listing dozens.
        if choice := re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message):
            message = choice[1] + (
                did_you_mean(choice[2], re.findall(r"[\w.-]+", choice[3])) or message[choice.end(1) :]
            )
        raise UsageError(message)

    parser.error = error
    return parser
