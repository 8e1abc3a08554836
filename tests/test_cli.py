"""The `hf-sam` command: `sft`, `clm`, and starting them on several processes."""

import os
import re
import subprocess
import sys

import pytest
import torch
from toy import olmo2
from toy_scripts import flags, same, saved, sft_flags

from hf_sam.cli import main


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
