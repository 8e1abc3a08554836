"""Training scripts with SAM: published ones, changed as the README shows or not at all, and the `hf-sam` command."""

import os
import re
import runpy
import subprocess
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
from safetensors.torch import load_file
from toy import olmo2
from toy_trl import rows, tokenizer

from hf_sam import SAMSFTConfig, SAMTrainingArguments
from hf_sam.cli import main
from hf_sam.script import run_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
URL = "https://raw.githubusercontent.com/huggingface/transformers/v{}/examples/pytorch/language-modeling/run_clm.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and datasets on disk, as the scripts load them."""
    folder = tmp_path_factory.mktemp("files")
    olmo2().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, kind in (("corpus", "text"), ("chats", "chat")):
        (folder / name).mkdir()
        rows(kind).to_json(folder / name / "train.jsonl")
        rows(kind, count=8).to_json(folder / name / "test.jsonl")
    (folder / "corpus.txt").write_text("\n".join(row["text"] for row in rows("text")))
    return folder


def flags(files, output_dir, **settings):
    settings = {
        "model_name_or_path": files / "model",
        "output_dir": output_dir,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "learning_rate": "1e-2",
        "save_strategy": "no",
        **settings,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def sft_flags(files, output_dir, **settings):
    return flags(files, output_dir, **{"dataset_name": files / "chats", "max_length": 16, "bf16": "false", **settings})


def saved(output_dir) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir) / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


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


def test_a_script_of_ones_own_runs_unchanged(tmp_path, monkeypatch):
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
    assert sys.modules["__main__"].__file__ != str(path)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from collections import OrderedDict", "config and trainer"),
        ("from transformers import TrainingArguments", "trainer"),
        ("import transformers\ntransformers.Trainer", "config"),
    ],
)
def test_a_script_in_which_sam_cannot_act_is_told_of(tmp_path, caplog, source, missing):
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


# The command.


def test_clm_trains_from_a_checkpoint_and_from_scratch_with_a_config_file(files, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {files / 'model'}\ndataset_name: {files / 'corpus'}\noutput_dir: {tmp_path / 'out'}\n"
        "max_steps: 2\nuse_cpu: true\nbf16: false\nmax_length: 16\nreport_to: none\nsave_strategy: 'no'\n"
        "learning_rate: 1e-2\nlogging_steps: 1\nsam_rho: 5e-2\neval_strategy: steps\neval_steps: 2\n"
    )
    assert main(["clm", "--config", str(config)]) == 0
    trained = saved(tmp_path / "out")
    scratch = ["--from_scratch", "--output_dir", str(tmp_path / "scratch"), "--learning_rate", "0.0"]
    assert main(["clm", "--config", str(config), *scratch]) == 0
    start = dict(olmo2().state_dict())
    assert not same(trained, start)
    # At a learning rate of zero the weights are those of the start, which were not the saved ones.
    assert not same(saved(tmp_path / "scratch"), start)
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (args.sam_rho, args.packing, args.packing_strategy) == (0.05, True, "wrapped")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": "chats"}, r"no column 'text', only 'messages'.*--dataset_text_field"),
        ({"dataset_train_split": "training"}, r"no split 'training', only 'train', 'test'"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"sam_phase": "anneal"}, "set anneal_steps"),
        ({"sam_rho": "nan"}, "sam_rho=nan"),
        ({"from_scratch": "true", "load_in_4bit": "true"}, "cannot be quantized"),
    ],
)
def test_clm_tells_what_is_missing(files, tmp_path, settings, message):
    settings = {"dataset_name": "corpus", "bf16": "false", **settings}
    if settings["dataset_name"] is not None:
        settings["dataset_name"] = files / settings["dataset_name"]
    argv = flags(files, tmp_path / "out", **settings)
    for name, value in settings.items():
        if value is None:
            index = argv.index(f"--{name}")
            del argv[index : index + 2]
    with pytest.raises(ValueError, match=message):
        main(["clm", *argv])


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_help_of_the_commands_has_groups_for_sam(capsys, command):
    with pytest.raises(SystemExit) as exit_status:
        main([command, "--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    groups = re.split(r"^(?=\S.*:$)", text, flags=re.MULTILINE)
    (sam,) = [group for group in groups if group.startswith("sharpness-aware training:")]
    (annealing,) = [group for group in groups if group.startswith("shortened annealing:")]
    assert sam.count("[SAM]") == 10
    assert annealing.count("[annealing]") == 3
    assert "--learning_rate" not in sam + annealing
    assert text.startswith(f"usage: hf-sam {command}")


def test_wrong_commands_are_answered(capsys, tmp_path):
    assert main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    assert main([]) == 0
    assert "run SCRIPT" in capsys.readouterr().out
    for argv, message in (
        (["run"], "required: script"),
        (["run", str(tmp_path / "absent.py")], "no script"),
        (["run", "--sam_roh", "0.1", __file__], "--sam_roh"),
    ):
        with pytest.raises(SystemExit) as exit_status:
            main(argv)
        assert exit_status.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("launched", [False, True])
def test_an_unknown_flag_is_an_error(files, tmp_path, capsys, monkeypatch, launched):
    if launched:
        monkeypatch.setenv("HF_SAM_LAUNCHED", "1")
    with pytest.raises(SystemExit) as exit_status:
        main(["sft", *sft_flags(files, tmp_path), "--sam_rhoo", "0.1"])
    assert exit_status.value.code != 0
    assert "--sam_rhoo" in capsys.readouterr().err


def test_two_processes_take_the_steps_of_one(files, tmp_path):
    # The same eight rows a step: eight on one process, four on each of two.
    common = {"sam_rho": 0.05, "gradient_checkpointing": "false", "lr_scheduler_type": "constant"}
    one = sft_flags(files, tmp_path / "one", per_device_train_batch_size=8, **common)
    two = sft_flags(files, tmp_path / "two", per_device_train_batch_size=4, ddp_backend="gloo", **common)
    assert main(["sft", *one]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_sam"]
    done = subprocess.run(
        [*torchrun, "sft", *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    settings = {**common, "sam_rho": 0, "per_device_train_batch_size": 8}
    assert main(["sft", *sft_flags(files, tmp_path / "plain", **settings)]) == 0
    mine, theirs, plain = (saved(tmp_path / name) for name in ("two", "one", "plain"))

    def distance(weights):
        difference = sum((weights[name] - value).square().sum() for name, value in theirs.items())
        return (difference / sum(value.square().sum() for value in theirs.values())).sqrt()

    assert distance(mine) <= 1e-4 < 1e-3 <= distance(plain)


def test_an_unknown_name_in_the_config_file_is_an_error_in_a_launched_process(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_SAM_LAUNCHED", "1")
    config = tmp_path / "config.yaml"
    config.write_text("sam_roh: 0.05\nnum_processes: 2\n")
    with pytest.raises(SystemExit) as exit_status:
        main(["sft", *sft_flags(files, tmp_path), "--config", str(config)])
    assert exit_status.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--sam_roh" in message
    assert "--num_processes" not in message


@pytest.mark.slow
@pytest.mark.parametrize("processes", [["--cpu", "--num_processes", "1"], ["--multi_gpu", "--num_processes", "2"]])
def test_accelerate_launches_underneath_when_asked_and_errors_travel_back(files, tmp_path, processes):
    config = tmp_path / "config.yaml"
    # A launcher's flag in the config file must not make the launched process launch again.
    config.write_text("num_machines: 1\nuse_fsdp: false\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_sam", "sft", "--config", str(config), *processes]
    common = {"gradient_checkpointing": "false", "sam_rho": 0.05}
    if processes[0] == "--multi_gpu":
        common["ddp_backend"] = "gloo"
    argv = sft_flags(files, tmp_path / "out", per_device_train_batch_size=8 // int(processes[-1]), **common)
    done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert main(["sft", *sft_flags(files, tmp_path / "here", per_device_train_batch_size=8, sam_rho=0.05)]) == 0
    mine, theirs = saved(tmp_path / "out"), saved(tmp_path / "here")
    for name, value in theirs.items():
        assert (mine[name] - value).norm() <= 1e-3 * value.norm(), name
    argv = sft_flags(files, tmp_path / "out", sam_rho=-1)
    done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "sam_rho=-1" in done.stderr
