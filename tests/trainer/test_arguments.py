"""The flags: accepted, refused, parsed, and carried along."""

import json
import re
from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from hf_sam import SAMArguments, SAMTrainingArguments, with_sam


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sam_rho", -0.1),
        ("sam_rho", float("nan")),
        ("sam_rho", float("inf")),
        ("sam_start_steps", -1),
        ("sam_start_steps", 2.5),
        ("sam_end_steps", 0),
        ("sam_end_steps", float("nan")),
        ("sam_interval", 0),
        ("sam_interval", 1.5),
        ("sam_phase", "tail"),
        ("sam_ascent_sync", "none"),
        ("sam_ascent_micro_batches", 0),
        ("sam_ascent_micro_batches", 1.5),
        ("anneal_steps", -3),
        ("anneal_steps", 0),
        ("anneal_type", "step"),
        ("anneal_min_lr_ratio", 1.0),
        ("sam_rho", True),
        ("sam_rho", "much"),
        ("sam_rho", None),
        ("sam_variant", "asma"),
    ],
)
def test_value_out_of_range_is_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        SAMTrainingArguments(output_dir=str(tmp_path), **{field: value})


def test_end_before_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sam_end_steps=5.*sam_start_steps=10"):
        SAMTrainingArguments(output_dir=str(tmp_path), sam_start_steps=10, sam_end_steps=5)


def test_share_and_count_may_be_mixed(tmp_path):
    args = SAMTrainingArguments(output_dir=str(tmp_path), sam_start_steps=10, sam_end_steps=0.5)
    assert (args.sam_start_steps, args.sam_end_steps) == (10, 0.5)


def test_phase_without_annealing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set anneal_steps"):
        SAMTrainingArguments(output_dir=str(tmp_path), sam_phase="anneal")


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "polynomial"])
def test_annealing_contradicts_another_schedule(tmp_path, scheduler):
    with pytest.raises(ValueError, match=f"anneal_steps=0.1.*'{scheduler}'"):
        SAMTrainingArguments(output_dir=str(tmp_path), anneal_steps=0.1, lr_scheduler_type=scheduler)


@pytest.mark.parametrize("scheduler", ["linear", "warmup_stable_decay"])
def test_annealing_selects_the_hosts_schedule(tmp_path, scheduler):
    args = SAMTrainingArguments(output_dir=str(tmp_path), anneal_steps=0.1, lr_scheduler_type=scheduler)
    assert args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY


@pytest.mark.parametrize("kwargs", [{"num_decay_steps": 5}, '{"decay_type": "linear"}'])
def test_annealing_contradicts_its_own_keys_in_scheduler_kwargs(tmp_path, kwargs):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        SAMTrainingArguments(output_dir=str(tmp_path), anneal_steps=5, lr_scheduler_kwargs=kwargs)


def test_flags_parse_on_the_command_line(tmp_path):
    parser = HfArgumentParser(SAMTrainingArguments)
    command = (
        f"--output_dir {tmp_path} --sam_rho 0.05 --sam_variant asam --sam_start_steps 0.9 --sam_interval 2 "
        "--sam_ascent_micro_batches 2 --sam_ascent_sync local --sam_target_modules mlp norm --anneal_steps 100 "
        "--anneal_type 1-sqrt --sam_phase anneal"
    )
    (args,) = parser.parse_args_into_dataclasses(command.split())
    assert (args.sam_rho, args.sam_variant, args.sam_start_steps, args.sam_interval) == (0.05, "asam", 0.9, 2)
    assert (args.sam_ascent_micro_batches, args.sam_ascent_sync) == (2, "local")
    assert (args.sam_target_modules, args.anneal_steps) == (["mlp", "norm"], 100)
    assert (args.anneal_type, args.sam_phase) == ("1-sqrt", "anneal")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(SAMTrainingArguments).parse_args_into_dataclasses(["--help"])
    text = capsys.readouterr().out
    for name, field in SAMArguments.__dataclass_fields__.items():
        assert f"--{name}" in text
        assert len(field.metadata["help"]) > 20, name
        assert f"{name} (" in SAMArguments.__doc__, f"{name} is missing in the docstring"


@pytest.mark.parametrize("base", ["transformers", "trl"])
def test_flags_of_sam_stand_together_in_the_help_of_any_parser(capsys, base):
    if base == "trl":
        from trl import DPOConfig, ModelConfig, TrlParser

        parser = TrlParser((with_sam(DPOConfig), ModelConfig))
    else:
        parser = HfArgumentParser((SAMTrainingArguments, Other))
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    text = capsys.readouterr().out
    usage = text[text.index("\noptions:") :]
    flags = list(dict.fromkeys(re.findall(r"^  --(?!no_)(\w+)", usage, re.MULTILINE)))
    ours = [flag for flag in flags if flag in SAMArguments.__dataclass_fields__]
    first = flags.index(ours[0])
    assert flags[first : first + len(ours)] == ours == list(SAMArguments.__dataclass_fields__)
    assert text.count("[SAM]") == 12
    assert text.count("[annealing]") == 3


@dataclass
class Other:
    """Another dataclass behind the arguments."""

    other: int = 0


def test_flags_and_yaml_work_through_the_parser_of_trl(tmp_path):
    from trl import DPOConfig, TrlParser

    from hf_sam import SAMSFTConfig

    file = tmp_path / "config.yaml"
    file.write_text("sam_rho: 5e-2\nsam_target_modules: [mlp, norm]\nanneal_steps: 0.1\nsam_phase: anneal\nbeta: 0.3\n")
    flags = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "--config", str(file)]
    parser = TrlParser(with_sam(DPOConfig))
    (args,) = parser.parse_args_and_config([*flags, "--sam_interval", "2"])
    assert (args.sam_rho, args.sam_target_modules, args.sam_phase) == (0.05, ["mlp", "norm"], "anneal")
    assert (args.anneal_steps, args.sam_interval, args.beta) == (0.1, 2, 0.3)
    with pytest.raises(ValueError, match="beta"):
        TrlParser(SAMSFTConfig).parse_args_and_config(flags)


def test_json_file_and_saved_dict_give_the_same_arguments(tmp_path):
    args = SAMTrainingArguments(output_dir=str(tmp_path), sam_rho=0.1, anneal_steps=0.2, sam_phase="anneal")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(args.to_dict()))
    (again,) = HfArgumentParser(SAMTrainingArguments).parse_json_file(str(file))
    for name in SAMArguments.__dataclass_fields__:
        assert getattr(again, name) == getattr(args, name)
    assert again.lr_scheduler_type == args.lr_scheduler_type


def test_a_config_of_the_user_carries_the_same_flags(tmp_path):
    @dataclass
    class MyConfig(SAMArguments, TrainingArguments):
        lr_scheduler_type: str = "cosine"
        my_flag: int = 3

    args = MyConfig(output_dir=str(tmp_path), sam_rho=0.2, anneal_steps=10)
    # Its own default is not mistaken for a choice of the user's.
    assert args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
    assert (args.sam_rho, args.my_flag) == (0.2, 3)
    with pytest.raises(ValueError, match="'constant'"):
        MyConfig(output_dir=str(tmp_path), anneal_steps=10, lr_scheduler_type="constant")


def test_numbers_that_yaml_reads_as_text_are_accepted(tmp_path):
    args = SAMTrainingArguments(output_dir=str(tmp_path), sam_rho="5e-2", anneal_steps="1e-1")
    assert (args.sam_rho, args.anneal_steps) == (0.05, 0.1)


def test_the_mixin_works_without_training_arguments():
    assert SAMArguments(sam_rho=0.05, anneal_steps=3).anneal_steps == 3
    with pytest.raises(ValueError, match="sam_rho"):
        SAMArguments(sam_rho=-1)
