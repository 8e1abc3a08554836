"""Training scripts with SAM: published ones, changed as the README shows or not at all."""

import os
import re
import runpy
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
import trl
import trl.scripts.sft
from toy_scripts import flags, same, saved, sft_flags

from hf_sam import SAMSFTConfig, SAMTrainingArguments
from hf_sam.commands import main
from hf_sam.commands.script import run_script

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
URL = "https://raw.githubusercontent.com/huggingface/transformers/v{}/examples/pytorch/language-modeling/run_clm.py"


def changed_as_shown(name: str, source: str) -> str:
    """The script `name` with the changes of its diff in the README."""
    (diff,) = [block for block in re.findall(r"```diff\n(.*?)```", README, re.DOTALL) if f"# {name}" in block]
    hunks, old, new = [], "", ""
    for line in [*diff.splitlines(), " "]:
        if line.startswith("-") and not new:
            old += line[1:] + "\n"
        elif line.startswith("+"):
            new += line[1:] + "\n"
        elif old or new:
            hunks.append((old, new))
            old, new = (line[1:] + "\n", "") if line.startswith("-") else ("", "")
    assert hunks
    for old, new in hunks:
        assert source.count(old) == 1, f"{name} has changed; the README shows:\n{old}"
        source = source.replace(old, new)
    return source


def run_python(path, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    return runpy.run_path(str(path), run_name="__main__")


def test_sft_script_of_trl_changed_as_the_readme_shows_and_unchanged(files, tmp_path, monkeypatch):
    source = Path(trl.scripts.sft.__file__).read_text()
    changed = tmp_path / "sft.py"
    changed.write_text(changed_as_shown("trl/scripts/sft.py", source))
    run_python(changed, sft_flags(files, tmp_path / "changed", sam_rho=0.05), monkeypatch)
    exchanged = run_script(trl.scripts.sft.__file__, sft_flags(files, tmp_path / "run", sam_rho=0.05))
    assert exchanged == {"SFTTrainer": "SAMSFTTrainer", "SFTConfig": "SAMSFTConfig"}
    assert main(["sft", *sft_flags(files, tmp_path / "command", sam_rho=0.05)]) == 0
    run_python(trl.scripts.sft.__file__, sft_flags(files, tmp_path / "plain"), monkeypatch)
    assert same(saved(tmp_path / "changed"), saved(tmp_path / "run"))
    assert same(saved(tmp_path / "changed"), saved(tmp_path / "command"))
    assert not same(saved(tmp_path / "changed"), saved(tmp_path / "plain"))
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert type(args) is SAMSFTConfig


@pytest.fixture(scope="module")
def run_clm(tmp_path_factory):
    """The example script of transformers, which no package on the registry holds."""
    folder = os.environ.get("HF_SAM_EXAMPLES")
    if folder is not None:
        return (Path(folder) / "run_clm.py").read_text()
    try:
        with urllib.request.urlopen(URL.format(transformers.__version__), timeout=10) as response:
            return response.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(
            f"run_clm.py could not be fetched ({error}). Set HF_SAM_EXAMPLES to a folder with that file, e.g. "
            "examples/pytorch/language-modeling of a checkout of transformers."
        )


def test_run_clm_of_transformers_changed_as_the_readme_shows_and_unchanged(files, tmp_path, monkeypatch, run_clm):
    pytest.importorskip("evaluate")
    common = {"train_file": files / "corpus.txt", "block_size": 16, "do_train": "true"}
    changed, original = tmp_path / "changed.py", tmp_path / "run_clm.py"
    changed.write_text(changed_as_shown("run_clm.py", run_clm))
    original.write_text(run_clm)
    run_python(changed, flags(files, tmp_path / "changed", sam_rho=0.05, **common), monkeypatch)
    exchanged = run_script(str(original), flags(files, tmp_path / "run", sam_rho=0.05, **common))
    assert exchanged == {"Trainer": "SAMTrainer", "TrainingArguments": "SAMTrainingArguments"}
    run_python(original, flags(files, tmp_path / "plain", **common), monkeypatch)
    assert same(saved(tmp_path / "changed"), saved(tmp_path / "run"))
    assert not same(saved(tmp_path / "changed"), saved(tmp_path / "plain"))
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert type(args) is SAMTrainingArguments
    assert "## Sharpness-aware training" in (tmp_path / "run" / "README.md").read_text()


# Scripts of a user's own, unchanged.

SCRIPT = '''
"""A script that names its classes in every way."""
from __future__ import annotations
import sys
from dataclasses import dataclass
import transformers
from transformers import TrainingArguments as Arguments
from toy import olmo2, token_dataset

@dataclass
class MyArguments(Arguments):
    extra: int = 3

def main():
    from transformers import Trainer, set_seed

    class MyTrainer(Trainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(1)
            return super().compute_loss(*args, **kwargs)

    (args,) = transformers.HfArgumentParser(MyArguments).parse_args_into_dataclasses()
    seen = []
    trainer = MyTrainer(model=olmo2(), args=args, train_dataset=token_dataset())
    trainer.train()
    direct = transformers.Trainer
    return trainer, args, seen, direct, __file__, __name__, sys.argv

if __name__ == "__main__":
    import holder
    holder.result = main()
'''


def test_a_script_of_the_user_runs_unchanged(tmp_path, monkeypatch):
    # What the script computes comes back through a module that the test can see.
    holder = types.ModuleType("holder")
    monkeypatch.setitem(sys.modules, "holder", holder)
    path = str(tmp_path / "train.py")
    Path(path).write_text(SCRIPT)
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    argv = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--sam_rho", "0.1", "--extra", "5"]
    argv += ["--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    exchanged = run_script(path, argv)
    trainer, args, seen, direct, file, name, seen_argv = holder.result
    assert exchanged == {"Trainer": "SAMTrainer", "TrainingArguments": "SAMTrainingArguments"}
    assert (args.sam_rho, args.extra) == (0.1, 5)
    assert len(seen) == 4  # two passes in two steps
    assert all(entry["sam/sharpness"] > 0 for entry in trainer.state.log_history[:2])
    assert direct.__name__ == "SAMTrainer"
    assert (file, name, seen_argv) == (path, "__main__", [path, *argv])
    # Nothing outside of the script has changed.
    assert transformers.Trainer.__name__ == "Trainer"
    assert transformers.Trainer.__module__ == "transformers.trainer"
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_errors_of_a_script_show_its_own_lines(tmp_path):
    path = tmp_path / "fails.py"
    path.write_text("from transformers import (\n    Trainer,\n    TrainingArguments,\n)\n\nraise KeyError('here')\n")
    with pytest.raises(KeyError) as caught:
        run_script(str(path), [])
    assert caught.traceback[-1].lineno + 1 == 6
    assert str(caught.traceback[-1].path) == str(path)
    assert getattr(sys.modules["__main__"], "__file__", None) != str(path)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from collections import OrderedDict", "config and trainer"),
        ("from transformers import TrainingArguments", "trainer"),
        ("import transformers\ntransformers.Trainer", "config"),
    ],
)
def test_a_script_in_which_sam_cannot_act_is_reported_of(tmp_path, caplog, source, missing):
    path = tmp_path / "nothing.py"
    path.write_text(source + "\n")
    with caplog.at_level("WARNING", logger="hf_sam"):
        run_script(str(path), [])
    assert f"names no {missing} class" in caplog.text


def test_unusual_scripts_run_unchanged(tmp_path):
    path = tmp_path / "unusual.py"
    path.write_bytes(
        "\ufeff# -*- coding: utf-8 -*-\n".encode() + b"import transformers\n"
        b"def kind(x):\n"
        b"    match x:\n"
        b"        case transformers.Trainer():\n"
        b"            return transformers.Trainer\n"
        b"        case transformers.TrainingArguments:\n"
        b"            return transformers.TrainingArguments\n"
        b"    return None\n"
        b"class Holder: pass\n"
        b"Holder.MyTrainer = transformers.Trainer\n"
        b"del Holder.MyTrainer\n"
        b"assert kind(3) is None\n"
        b"assert kind(transformers.TrainingArguments) is None\n"  # the pattern stays the plain class
        b"assert transformers.Trainer.__name__ == 'SAMTrainer'\n"
    )
    exchanged = run_script(str(path), [])
    assert exchanged == {"Trainer": "SAMTrainer", "TrainingArguments": "SAMTrainingArguments"}


def test_flags_in_front_of_a_script_are_defaults_for_arguments_that_it_writes_down(tmp_path, monkeypatch):
    holder = types.ModuleType("holder")
    monkeypatch.setitem(sys.modules, "holder", holder)
    path = tmp_path / "written.py"
    path.write_text(
        "import sys\n"
        "from transformers import Trainer, TrainingArguments\n"
        "from toy import olmo2, token_dataset\n"
        f"args = TrainingArguments(output_dir={str(tmp_path / 'out')!r}, max_steps=2, use_cpu=True, logging_steps=1,\n"
        "                         report_to='none', save_strategy='no')\n"
        "import transformers\n"
        "assert isinstance(args, transformers.TrainingArguments)\n"
        "trainer = Trainer(model=olmo2(), args=args, train_dataset=token_dataset())\n"
        "trainer.train()\n"
        "trainer.save_model()\n"
        "import holder\n"
        "holder.result = trainer, sys.argv\n"
    )
    assert main(["run", "--sam_rho", "0.05", "--sam_interval", "2", str(path), "--of", "the script"]) == 0
    trainer, argv = holder.result
    assert argv == [str(path), "--of", "the script"]
    assert (trainer.args.sam_rho, trainer.args.sam_interval) == (0.05, 2)
    assert ["sam/sharpness" in entry for entry in trainer.state.log_history[:2]] == [True, False]
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert isinstance(args, SAMTrainingArguments)
    assert args.sam_rho == 0.05
