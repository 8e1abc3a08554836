"""`with_sam`: classes made at run time that behave like written ones."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from toy import olmo2, token_dataset
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_sam import SAMArguments, SAMMixin, SAMTrainer, SAMTrainingArguments, with_sam


def settings(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}


def test_the_same_class_every_time_and_none_where_there_is_one():
    assert with_sam(Trainer) is SAMTrainer
    assert with_sam(TrainingArguments) is SAMTrainingArguments
    assert with_sam(SAMTrainer) is SAMTrainer
    assert with_sam(Seq2SeqTrainer) is with_sam(Seq2SeqTrainer)
    assert with_sam(Seq2SeqTrainer).__mro__[1:3] == (SAMMixin, Seq2SeqTrainer)
    assert with_sam(Seq2SeqTrainer).__name__ == "SAMSeq2SeqTrainer"
    assert with_sam(Seq2SeqTrainingArguments).__mro__[1:3] == (SAMArguments, Seq2SeqTrainingArguments)


def test_configs_can_be_copied_replaced_and_pickled(tmp_path):
    args = with_sam(Seq2SeqTrainingArguments)(**settings(tmp_path), sam_rho=0.1, predict_with_generate=True)
    for again in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert type(again) is type(args)
        assert again.to_dict() == args.to_dict()
    changed = dataclasses.replace(args, sam_rho=0.2)
    assert (changed.sam_rho, changed.predict_with_generate, args.sam_rho) == (0.2, True, 0.1)


def test_a_config_is_read_back_by_a_process_that_never_made_its_class(tmp_path):
    args = with_sam(Seq2SeqTrainingArguments)(**settings(tmp_path), sam_rho=0.1)
    torch.save(args, tmp_path / "training_args.bin")
    program = (
        "import torch\n"
        f"args = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False)\n"
        "print(type(args).__name__, args.sam_rho, args.output_dir)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SAMSeq2SeqTrainingArguments", "0.1", str(tmp_path)]


def test_a_class_derived_from_a_made_one_is_pickled_as_itself(tmp_path):
    args = Derived(**settings(tmp_path), sam_rho=0.1, more=4)
    again = pickle.loads(pickle.dumps(args))
    assert type(again) is Derived
    assert (again.sam_rho, again.more) == (0.1, 4)


@dataclass
class Derived(with_sam(Seq2SeqTrainingArguments)):
    """A user's own fields on top."""

    more: int = 3


def test_defaults_of_a_config_can_be_chosen(tmp_path):
    config = with_sam(TrainingArguments, sam_rho=0.05, sam_target_modules=["mlp"])
    args = config(**settings(tmp_path))
    assert (args.sam_rho, args.sam_target_modules) == (0.05, ["mlp"])
    assert args.sam_target_modules is not config(**settings(tmp_path)).sam_target_modules
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(["--output_dir", "x", "--sam_interval", "2"])
    assert (parsed.sam_rho, parsed.sam_interval) == (0.05, 2)
    assert with_sam(TrainingArguments, sam_rho=0.05, sam_target_modules=["mlp"]) is config
    for again in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert type(again) is config
        assert again.to_dict() == args.to_dict()
    # Also on top of a class that was made before.
    stacked = with_sam(with_sam(Seq2SeqTrainingArguments), sam_rho=0.3)(**settings(tmp_path))
    assert pickle.loads(pickle.dumps(stacked)).sam_rho == 0.3
    assert SAMTrainingArguments(**settings(tmp_path)).sam_rho == 0.0
    with pytest.raises(TypeError, match="'sam_roh'"):
        with_sam(TrainingArguments, sam_roh=0.05)
    with pytest.raises(TypeError, match="belong to the config"):
        with_sam(Trainer, sam_rho=0.05)


@pytest.mark.parametrize("config", [SAMTrainingArguments, with_sam(TrainingArguments, sam_rho=0.1)])
def test_tokens_do_not_show_in_the_text_of_a_config(tmp_path, config):
    args = config(**settings(tmp_path), hub_token="secret-token", sam_interval=2)
    assert "secret-token" not in repr(args)
    assert "secret-token" not in str(args)
    assert "sam_interval=2" in repr(args)


def test_what_cannot_have_the_fields_is_refused():
    class WithInit(TrainingArguments):
        def __init__(self, rate, **kwargs):
            super().__init__(learning_rate=rate, **kwargs)

    @dataclass
    class DataclassWithInit(TrainingArguments):
        def __init__(self, output_dir, **kwargs):
            super().__init__(output_dir, learning_rate=0.1, **kwargs)

    class Written(SAMArguments, TrainingArguments):
        def __init__(self, output_dir, **kwargs):
            super().__init__(output_dir=output_dir, **kwargs)

    @dataclass
    class Taken(TrainingArguments):
        anneal_steps: int = 100

    for cls in (WithInit, DataclassWithInit):
        with pytest.raises(TypeError, match=rf"{cls.__name__}, which has an __init__ of its own"):
            with_sam(cls)
    assert with_sam(Written) is Written
    with pytest.raises(TypeError, match="Written, which has an __init__ of its own"):
        with_sam(Written, sam_rho=0.05)
    with pytest.raises(TypeError, match="anneal_steps with a meaning of its own"):
        with_sam(Taken)
    with pytest.raises(TypeError, match="Trainer or TrainingArguments class, not <class 'dict'>"):
        with_sam(dict)
    with pytest.raises(TypeError, match="not 3"):
        with_sam(3)


def test_a_trainer_that_makes_its_arguments_itself(tmp_path):
    class Own(Trainer):
        def __init__(self, model, rho):
            args = SAMTrainingArguments(**settings(tmp_path), sam_rho=rho, max_steps=1, logging_steps=1)
            super().__init__(model=model, args=args, train_dataset=token_dataset(rows=8))

    run = with_sam(Own)(olmo2(), 0.05)
    run.train()
    assert run.state.log_history[0]["sam/sharpness"] > 0

    class Plain(Trainer):
        def __init__(self, model):
            super().__init__(model=model, args=TrainingArguments(**settings(tmp_path)))

    with pytest.raises(ValueError, match=r"SAMPlain needs.*with_sam\(TrainingArguments\)"):
        with_sam(Plain)(olmo2())
