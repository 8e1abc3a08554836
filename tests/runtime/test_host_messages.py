"""What host libraries print that tells a user nothing is not printed, and nothing else is kept back."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from toy_scripts import sft_flags

from hf_sam import commands
from hf_sam.commands.reporting import run_command
from hf_sam.runtime import host_messages

ROOT = Path(__file__).parents[2]
NOISE = [
    *(text for _, text in host_messages._LOG_MESSAGES),
    *(text for text, *_ in host_messages._WARNINGS),
    "FutureWarning",
]

# Of a bar with a total, or of rows that are counted.
PROGRESS = re.compile(r"\d+%\|.*\| \d+/\d+ \[|: \d+ examples \[")


def run_python(*argv) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_run_from_beginning_to_end_prints_only_progress(files, tmp_path):
    """In a process of its own, in which the libraries are imported for the first time; TRL's defaults, adapters."""
    flags = sft_flags(files, tmp_path, sam_rho=0.05, use_peft="true", lora_target_modules="all-linear")
    done = run_python("-m", "hf_sam", "sft", *flags)
    assert not [text for text in NOISE if text in done.stderr]
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in lines if not PROGRESS.search(line)] == []


def test_a_recipe_begins_without_noise():
    assert run_python("recipes/metamath_sft.py", "--help").stderr == ""


def test_an_evaluation_in_8_bits_says_nothing_about_each_layer(shelf, tmp_path, capfd, recwarn):
    argv = ["--base", shelf / "base", "--tuned", shelf / "adapter", "--data", shelf / "old.jsonl", "--quantize", "int8"]
    argv += ["--max_length", "64", "--max_documents", "4", "--output", tmp_path]
    assert commands.main(["evaluate", *map(str, argv)]) == 0
    err = capfd.readouterr().err
    assert not [text for text in NOISE if text in err]
    assert not [warning for warning in recwarn if any(text in str(warning.message) for text in NOISE)]


@pytest.mark.parametrize(("name", "beginning"), host_messages._LOG_MESSAGES)
def test_other_messages_of_a_logger_get_through(caplog, name, beginning):
    logger = logging.getLogger(name)
    logger.propagate, before = True, logger.propagate
    try:
        logger.warning(beginning + " %s", "something")
        logger.warning("The GPU is on fire, %s", beginning)
    finally:
        logger.propagate = before
    assert caplog.messages == [f"The GPU is on fire, {beginning}"]


def test_the_same_warning_of_a_users_own_code_gets_through():
    def program() -> int:
        warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        return 0

    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert run_command("x", program) == 0
