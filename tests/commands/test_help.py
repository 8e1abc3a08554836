"""`--help` of everything that has one."""

import argparse
import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sam import commands
from hf_sam.commands import clm, compare, evaluate, pretrain, report, reproduce, run, sft, suggest_rho, sweep, toy_data
from hf_sam.commands.launch import launcher_parser

ROOT = Path(__file__).parents[2]
FOLDERS = ("hf_sam", "recipes", "benchmarks")
PYTHON = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SCRIPTS = [
    path for path in PYTHON if path.name != "__main__.py" and 'if __name__ == "__main__":\n    ' in path.read_text()
]
# Files that make parsers, and what makes them. Those of scripts and commands are run below as they are.
MADE_IN = {
    "hf_sam/commands/sft.py": (sft.make_parser,),
    "hf_sam/commands/clm.py": (clm.make_parser,),
    "hf_sam/commands/run.py": (run.make_parser,),
    "hf_sam/commands/launch.py": (launcher_parser,),
    "hf_sam/commands/evaluate.py": (evaluate.make_parser,),
    "hf_sam/commands/report.py": (report.make_parser,),
    "hf_sam/commands/suggest_rho.py": (suggest_rho.make_parser,),
    "hf_sam/commands/pretrain.py": (pretrain.make_parser,),
    "hf_sam/commands/sweep.py": (sweep.make_parser,),
    "hf_sam/commands/compare.py": (compare.make_parser,),
    "hf_sam/commands/reproduce.py": (reproduce.make_parser,),
    "hf_sam/commands/toy_data.py": (toy_data.make_parser,),
    # A class for the parsers of other scripts, and one for those of the commands.
    "hf_sam/commands/script.py": (),
    "hf_sam/runtime/config.py": (),
    "recipes/configuration.py": (),
}


def ended(capsys, run) -> str:
    """What it printed before it ended without an error."""
    with pytest.raises(SystemExit) as exit_status:
        run()
    captured = capsys.readouterr()
    assert exit_status.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_commands(capsys, command):
    text = ended(capsys, lambda: commands.main([command, "--help"]))
    assert text.startswith(f"usage: hf-sam {command}")
    # All are in the help of `hf-sam` itself.
    assert commands.main(["--help"]) == 0
    assert re.search(rf"^  {command}\b", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(capsys, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    assert "usage: " in ended(capsys, lambda: runpy.run_path(str(script), run_name="__main__"))


def test_no_parser_is_left_out():
    """A file that makes a parser, or a class of parsers, is a script that is run above or is in the table."""
    makers = set()
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.Call):
                named = [node.func]
            elif isinstance(node, ast.ClassDef):
                named = node.bases
            names = [ast.unparse(name) for name in named]
            if any(re.search(r"(Argument|Trl|Config|launch_command_)[pP]arser$", name) for name in names):
                makers.add(path)
    assert {str(path.relative_to(ROOT)) for path in makers - set(SCRIPTS)} <= MADE_IN.keys()
    for make in (make for makes in MADE_IN.values() for make in makes):
        parser = make()
        assert isinstance(parser, argparse.ArgumentParser)
        assert parser.format_help()


@pytest.mark.parametrize("argv", [["--help"], ["evaluate", "--help"]])
def test_a_reader_that_stops_is_no_error(argv):
    """As in `hf-sam --help | head -1`: the end of the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "hf_sam", *argv], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode in (0, 141)  # argparse ignores it
    assert done.stderr == ""
