"""Error reports of commands: user errors in one line with status 2, bugs with their traceback.

An error is a user error if it is

1. an invalid command line ([`UsageError`]);
2. a `ValueError`, `OSError`, `ImportError`, `FloatingPointError` or `MeasurementError` raised by hf-sam, whose messages
   are written for users;
3. an error of these types from a `raise` statement in one of `_LIBRARIES`, before training begins. In the training
   loop, the same error is a bug, because settings, model and data have been checked;
4. an `OSError` of the operating system before training begins, or, at any time, one about a file that cannot be written
   (no space, no permission, a read-only file system).

All other errors keep their traceback. A `ValueError` of the interpreter, e.g. of `int("x")`, does not come from a
`raise` statement, so it is always a bug. `HF_SAM_DEBUG=1` also shows the traceback of user errors.
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
USER_ERROR, INTERRUPTED = 2, 130  # exit statuses; 130 is what shells return after Ctrl-C

_TYPES = (ValueError, OSError, ImportError, FloatingPointError)
_LIBRARIES = {"transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "lm_eval", "bitsandbytes"}
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def run_command(prog: str, program: Callable[[], int], *, library_errors: bool = True) -> int:
    """Run a command, and report its errors by the rules of this module.

    Under a launcher, only the first process of each machine reports.

    Args:
        prog (`str`): prefix of error messages.
        program (`Callable[[], int]`): the command; returns the exit status.
        library_errors (`bool`, defaults to `True`): whether errors of libraries and of the operating system can be user
            errors. Use `False` if the command runs a script of the user.

    Returns:
        `int`: the status of the program, 2 after a user error, 130 after Ctrl-C.
    """
    filter_warnings()
    try:
        return program()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        if is_debugging():
            raise
        status, message = INTERRUPTED, "interrupted."
    except Exception as error:
        if is_debugging() or not is_user_error(error, library_errors):
            raise
        status, message = USER_ERROR, _message(error, prog)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: {message}", file=sys.stderr)
    return status


def is_debugging() -> bool:
    """Whether user errors are shown with their traceback."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def is_user_error(error: Exception, library_errors: bool = True) -> bool:
    """Whether a caught error is a user error, by the rules of this module."""
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
    if not library_errors:
        return False
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return True
    from_system = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    return ((raised and package in _LIBRARIES) or from_system) and not _in_training(frame for frame, _ in frames)


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
    """Arguments that the `HfArgumentParser` of a script does not know, and the flags that it knows."""
    for frame, _ in _frames(error):
        if frame.f_code.co_name == "parse_args_into_dataclasses" and isinstance(error, ValueError):
            parser, unused = frame.f_locals.get("self"), frame.f_locals.get("remaining_args")
            if isinstance(parser, argparse.ArgumentParser) and unused and repr(unused) in str(error):
                return unused, list(parser._option_string_actions)
    return None
