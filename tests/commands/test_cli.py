"""The `hf-sam` command: `sft`, `clm`, and starting them on several processes."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from toy import olmo2
from toy_scripts import flags, same, saved, sft_flags

from hf_sam.commands import main


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
        ({"dataset_name": None}, "no data to train on. Set --dataset_name"),
        ({"model_name_or_path": None}, "no model to train. Set --model_name_or_path"),
        ({"sam_phase": "anneal"}, "set anneal_steps"),
        ({"sam_rho": "nan"}, "sam_rho=nan"),
        ({"from_scratch": "true", "load_in_4bit": "true"}, "cannot be quantized"),
    ],
)
def test_clm_states_what_is_missing(files, tmp_path, capsys, settings, message):
    settings = {"dataset_name": "corpus", "bf16": "false", **settings}
    if settings["dataset_name"] is not None:
        settings["dataset_name"] = files / settings["dataset_name"]
    argv = flags(files, tmp_path / "out", **settings)
    for name, value in settings.items():
        if value is None:
            index = argv.index(f"--{name}")
            del argv[index : index + 2]
    assert main(["clm", *argv]) == 2
    assert re.search(message, one_line(capsys, "hf-sam clm"))


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_help_of_the_commands_has_groups_for_sam(capsys, command):
    with pytest.raises(SystemExit) as exit_status:
        main([command, "--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    groups = re.split(r"^(?=\S.*:$)", text, flags=re.MULTILINE)
    (sam,) = [group for group in groups if group.startswith("sharpness-aware training:")]
    (annealing,) = [group for group in groups if group.startswith("shortened annealing:")]
    assert sam.count("[SAM]") == 12
    assert annealing.count("[annealing]") == 3
    assert "--learning_rate" not in sam + annealing
    assert text.startswith(f"usage: hf-sam {command}")


def one_line(capsys, prog: str) -> str:
    """What a command told about an error, which is one line."""
    captured = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]+", captured.err) if line and not re.search(r"\d+%\||examples/s", line)]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"{prog}: ")
    return lines[0]


def test_wrong_commands_are_answered(capsys, tmp_path):
    assert main([]) == 0
    assert "run SCRIPT" in capsys.readouterr().out
    for argv, prog, message in (
        (["dance"], "hf-sam", "no command 'dance'; the commands are sft, clm, run"),
        (["evalute"], "hf-sam", "no command 'evalute'. Did you mean evaluate?"),
        (["run"], "hf-sam run", "required: script"),
        (["run", str(tmp_path / "absent.py")], "hf-sam run", "no script"),
        (["run", "--sam_roh", "0.1", __file__], "hf-sam run", "--sam_roh. Did you mean --sam_rho?"),
        (["run", "--sam_rho", "-1", __file__], "hf-sam run", "sam_rho=-1.0 must be"),
        (["report"], "hf-sam report", "required: DIR"),
    ):
        assert main(argv) == 2
        assert message in one_line(capsys, prog)


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sam_rhoo", "0.1"], "unrecognized argument --sam_rhoo. Did you mean --sam_rho?"),
        (["--sam_rho"], "--sam_rho/--sam-rho: expected one argument"),
        (["--sam_rho", "much"], "invalid float value: 'much'"),
        (["--optim", "adamw_troch"], "invalid choice: 'adamw_troch'. Did you mean adamw_torch?"),
        (["--sam_rho", "-1"], "sam_rho=-1.0 must be"),
        (["stray"], "unrecognized argument stray. `hf-sam sft --help`"),
        (["--config"], "--config: expected at least one argument"),
    ],
)
def test_wrong_flags_are_reported_in_one_line(files, tmp_path, capsys, monkeypatch, launched, wrong, message):
    if launched:
        monkeypatch.setenv("HF_SAM_LAUNCHED", "1")
    assert main(["sft", *sft_flags(files, tmp_path), *wrong]) == 2
    assert message in one_line(capsys, "hf-sam sft")


def test_flags_that_are_nearly_those_of_the_launcher_are_reported(files, tmp_path, capsys):
    for wrong, message in (
        (["--num_proceses", "2"], "--num_proceses. Did you mean --num_processes?"),
        (["--accelerate_config", "zero9"], "zero9 is neither a file nor a valid config"),
        (["--num_processes", "2", "stray"], "unrecognized argument stray"),
        (["--num_processes", "two"], "invalid int value: 'two'"),
    ):
        assert main(["sft", *sft_flags(files, tmp_path), *wrong]) == 2
        assert message in one_line(capsys, "hf-sam sft")


@pytest.mark.parametrize("command", ["sft", "clm", "evaluate"])
@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "absent.yaml cannot be read: No such file"),
        ("a: [\n", "is not valid YAML"),
        ("- a\n", "must hold a mapping of flags to values"),
        # Flags of the launcher may stand beside those of the command.
        (
            "sam_roh: 0.05\nnum_processes: 2\n",
            "config.yaml sets 'sam_roh', which is not a setting of hf-sam {command}. Did you mean sam_rho?",
        ),
    ],
)
def test_wrong_config_files_are_reported_in_one_line(
    tmp_path, capsys, monkeypatch, command, launched, content, message
):
    if launched:
        monkeypatch.setenv("HF_SAM_LAUNCHED", "1")
    config = tmp_path / "absent.yaml"
    if content is not None:
        config = tmp_path / "config.yaml"
        config.write_text(content)
    for flag in (["--config", str(config)], [f"--config={config}"]):
        assert main([command, *flag]) == 2
        assert message.format(command=command) in one_line(capsys, f"hf-sam {command}")


@pytest.mark.parametrize("command", ["sft", "clm"])
def test_what_a_run_needs_is_reported_before_it_is_loaded(files, tmp_path, capsys, command):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    model = tmp_path / "truncated"
    shutil.copytree(files / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for change, message in (
        ({"model_name_or_path": "/nowhere"}, "There is no folder '/nowhere'"),
        ({"model_name_or_path": "org/nowhere"}, "'org/nowhere' is not in the local cache; the Hub cannot be reached"),
        ({"model_name_or_path": tmp_path / "empty"}, "neither config.json nor adapter_config.json"),
        ({"model_name_or_path": model}, "truncated/model.safetensors' is damaged"),
        ({"dataset_name": "org/nowhere"}, "Training data 'org/nowhere': it cannot be loaded: there is no such file"),
        ({"dataset_name": "./nowhere.jsonl"}, "'./nowhere.jsonl': it cannot be loaded: there is no such file"),
        ({"dataset_train_split": "trian"}, "no split 'trian', only 'train', 'test'"),
        ({"output_dir": tmp_path / "file" / "out"}, "cannot be written to: .*/file is a file. Choose another"),
        ({"resume_from_checkpoint": tmp_path / "empty"}, "valid checkpoint"),
        ({"resume_from_checkpoint": model}, "truncated/model.safetensors' is damaged"),
    ):
        settings = {"dataset_name": files / ("chats" if command == "sft" else "corpus"), **change}
        argv = sft_flags(files, settings.pop("output_dir", tmp_path / "out"), **settings)
        assert main([command, *argv]) == 2
        line = one_line(capsys, f"hf-sam {command}")
        assert re.search(message, line), line
        assert "No disk space" not in line


def test_ctrl_c_and_the_errors_of_a_script(tmp_path, capsys, monkeypatch):
    """A script of one's own fails as under Python; only what hf-sam has to say about it is told in a line."""
    script = tmp_path / "script.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    assert main(["run", str(script)]) == 130
    signal.signal(signal.SIGINT, handler)
    assert "interrupted" in one_line(capsys, "hf-sam run")
    script.write_text("raise ValueError('of the script')\n")
    with pytest.raises(ValueError, match="of the script"):
        main(["run", str(script)])
    script.write_text(
        "from transformers import HfArgumentParser, Trainer, TrainingArguments\n"
        "HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
    )
    for argv, message in (
        (["--sam_roh", "0.1"], "unrecognized argument --sam_roh. Did you mean --sam_rho?"),
        (["--sam_rho", "much"], "invalid float value: 'much'"),
        (["--sam_rho", "-1"], "sam_rho=-1.0 must be"),
    ):
        assert main(["run", str(script), "--output_dir", str(tmp_path / "out"), "--use_cpu", *argv]) == 2
        assert message in one_line(capsys, "hf-sam run")
    # Asked for, the traceback of a mistake is shown.
    monkeypatch.setenv("HF_SAM_DEBUG", "0")
    with pytest.raises(ValueError, match=r"sam_rho=-1.0 must be"):
        main(["--debug", "run", "--sam_rho", "-1", str(script)])


def test_a_launched_process_states_its_mistake_and_the_launcher_passes_its_status_on(files, tmp_path, capfd):
    argv = sft_flags(files, tmp_path / "out", sam_rho=-1)
    assert main(["sft", "--cpu", "--num_processes", "1", *argv]) == 2
    err = capfd.readouterr().err
    assert err.splitlines()[-1].startswith("hf-sam sft: sam_rho=-1.0 must be")
    assert "Traceback" not in err
    assert "HF_SAM_LAUNCHED" not in os.environ


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
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hf-sam sft: sam_rho=-1.0")
    assert "Traceback" not in done.stderr
