"""How commands report errors: a mistake of the user in one line and status 2, a bug with its traceback.

One rule for all commands of `hf-sam`. An error is a mistake of the user if it is

1. a wrong command line ([`UsageError`]);
2. a `ValueError`, `OSError`, `ImportError`, `FloatingPointError` or `MeasurementError` that hf-sam raises: its message
   is written for the user;
3. one of these types, raised by a `raise` statement of a host library before training begins. Within the training
   loop the same error is a bug: settings, model and data were fine;
4. an `OSError` of the operating system before training begins, or at any time one that says that a file cannot be
   written (no space, no permission, a read-only file system).

Everything else keeps its traceback. A `ValueError` of the interpreter itself, as of `int("x")`, is raised by no `raise`
statement, and so is a bug wherever it comes from. `HF_SAM_DEBUG=1` shows the traceback of mistakes, too.
"""

import argparse
import dis
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from ..runtime.errors import MeasurementError, UsageError, unknown_arguments
from ..runtime.host_messages import filter_warnings

DEBUG = "HF_SAM_DEBUG"
_PACKAGE = __package__.partition(".")[0]
MISTAKE, INTERRUPTED = 2, 130  # exit statuses; the second one is that of a shell after Ctrl-C

_TYPES = (ValueError, OSError, ImportError, FloatingPointError)
_HOSTS = {"transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "lm_eval", "bitsandbytes"}
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def run_command(prog: str, program: Callable[[], int], *, hosts: bool = True) -> int:
    """Run a command, and report its errors as the rule of this module says.

    Under a launcher, the first process of each machine reports.

    Args:
        prog (`str`): what the line of an error begins with.
        program (`Callable[[], int]`): the command; returns the exit status.
        hosts (`bool`, defaults to `True`): whether errors of host libraries and of the operating system may be
            mistakes; they are not where the command runs a script of the user's own.

    Returns:
        `int`: the status of the program, 2 after a mistake, 130 after Ctrl-C.
    """
    filter_warnings()
    try:
        return program()
    except KeyboardInterrupt:
        if is_debugging():
            raise
        status, message = INTERRUPTED, "interrupted."
    except Exception as error:
        if is_debugging() or not is_mistake(error, hosts):
            raise
        status, message = MISTAKE, _message(error, prog)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: {message}", file=sys.stderr)
    return status


def is_debugging() -> bool:
    """Whether mistakes are shown with their traceback."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def is_mistake(error: Exception, hosts: bool = True) -> bool:
    """Whether an error that was caught is a mistake of the user; see the rule of this module."""
    if isinstance(error, UsageError) or _unused_arguments(error) is not None:
        return True
    frames = list(_frames(error))
    if not isinstance(error, (*_TYPES, MeasurementError)) or not frames:
        return False
    innermost, instruction = frames[-1]
    package = innermost.f_globals.get("__name__", "").partition(".")[0]
    raised = dis.opname[innermost.f_code.co_code[instruction]] in ("RAISE_VARARGS", "RERAISE")
    if raised and package == _PACKAGE:
        return True
    if not hosts:
        return False
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return True
    refused = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    return ((raised and package in _HOSTS) or refused) and not _in_training(frame for frame, _ in frames)


def _frames(error: Exception) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lasti
        traceback = traceback.tb_next


def _in_training(frames: Iterable[FrameType]) -> bool:
    from transformers import Trainer

    return any(frame.f_code is Trainer._inner_training_loop.__code__ for frame in frames)


def _message(error: Exception, prog: str) -> str:
    if (unused := _unused_arguments(error)) is not None:
        error = unknown_arguments(*unused)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}."
    text = " ".join(str(error).split())
    if isinstance(error, UsageError) and not text.endswith((".", "?")):
        text = f"{text}. `{prog} --help` lists the flags."
    return text


def _unused_arguments(error: Exception) -> tuple[list[str], list[str]] | None:
    """Arguments that an `HfArgumentParser` of a script did not know, and the flags that it does know."""
    for frame, _ in _frames(error):
        if frame.f_code.co_name == "parse_args_into_dataclasses" and isinstance(error, ValueError):
            parser, unused = frame.f_locals.get("self"), frame.f_locals.get("remaining_args")
            if isinstance(parser, argparse.ArgumentParser) and unused and repr(unused) in str(error):
                return unused, list(parser._option_string_actions)
    return None
