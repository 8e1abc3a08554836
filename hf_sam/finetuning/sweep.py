"""A fine-tuning sweep: the same model and data, once for each learning rate."""

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoTokenizer

from ..planning import parse_tokens
from ..runtime.checkpoints import CheckpointRecord, last_complete
from ..runtime.dataset_specs import local_files
from ..runtime.disk import check_disk
from ..runtime.distributed import launched_world_size
from ..runtime.models import LocalModel, find_model
from ..runtime.run_record import decisive_settings, is_finished, mark_finished, write_settings
from .data import add_rehearsal, load_examples, take_tokens
from .settings import SFTDataArguments

if TYPE_CHECKING:
    from trl import ModelConfig

    from .trainer import SweepConfig

MakeArguments = Callable[[float], "SweepConfig"]


def run_sweep(
    rates: Sequence[float],
    make_args: MakeArguments,
    data: SFTDataArguments,
    model_args: "ModelConfig",
    *,
    keep_checkpoints: bool = False,
) -> None:
    """Fine-tune a model once for each learning rate; finished runs are left alone, interrupted ones resumed.

    The held-out examples are written as `held_out.jsonl` beside the output folders.

    Args:
        rates (`Sequence[float]`): the learning rates.
        make_args (`Callable[[float], SweepConfig]`): makes the arguments of the run with a learning rate, with an
            `output_dir` of its own. Called when a run begins, because building the arguments sets up the host for it.
        data ([`SFTDataArguments`]): what to fine-tune on.
        model_args ([`~trl.ModelConfig`]): the model, adapters and quantization.
        keep_checkpoints (`bool`, defaults to `False`): whether the checkpoints of finished runs stay.

    Raises:
        ValueError, OSError: before training, if an input is wrong or missing, or the disk is too small.
    """
    check_inputs(rates, data, model_args)
    if model_args.use_peft and make_args(rates[0]).l2_lambda:
        raise ValueError(
            "l2_lambda holds trained weights near those of the base, but adapters are trained beside it. Drop "
            "l2_lambda or use_peft."
        )
    source = _find_model(model_args)
    missing = [
        rate for rate in rates if not is_finished(args := make_args(rate), _settings(args, data, model_args, source))
    ]
    if not missing:
        return
    first = make_args(missing[0])
    if first.n_gpu > 1:
        raise ValueError(
            f"One process has {first.n_gpu} GPUs. Start one process for each (accelerate launch SCRIPT ...), or show "
            "it one: CUDA_VISIBLE_DEVICES=0."
        )
    if not model_args.use_peft:
        _check_space(first, source, len(missing))
    tokenizer = _load_tokenizer(first, data, model_args, source)
    examples = _load_data(first, data, tokenizer)
    for rate in missing:
        args = make_args(rate)
        _train(args, _settings(args, data, model_args, source), examples, tokenizer, source, model_args)
        if not keep_checkpoints and args.process_index == 0:
            for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)


def check_inputs(rates: Sequence[float], data: SFTDataArguments, model_args: "ModelConfig") -> None:
    """Raises ValueError if a learning rate, the model or the data cannot be used; loads nothing."""
    if any(rate <= 0 for rate in rates):
        raise ValueError(f"learning_rates={list(rates)} must be larger than 0.")
    data.check()
    if model_args.model_name_or_path is None:
        raise ValueError("Choose a model to fine-tune: model_name_or_path, a folder or an id of the hub.")


def _find_model(model_args: "ModelConfig") -> LocalModel:
    name, revision = model_args.model_name_or_path, model_args.model_revision
    at = f"@{revision}" if revision not in (None, "main") and not os.path.isdir(name) else ""
    return find_model(f"{name}{at}")


def _settings(args: "SweepConfig", data: SFTDataArguments, model_args: "ModelConfig", source: LocalModel) -> dict:
    sequences = args.per_device_train_batch_size * launched_world_size() * args.gradient_accumulation_steps
    files = [local_files(spec) for spec in (data.dataset, data.rehearsal_data) if spec]
    facts = {**args.layout_dependence(), "sequences": sequences, "weights": source.fingerprint, "files": files}
    return decisive_settings(args, data, model_args, **facts)


def _load_tokenizer(args: "SweepConfig", data: SFTDataArguments, model_args: "ModelConfig", source: LocalModel):
    tokenizer = AutoTokenizer.from_pretrained(str(source.folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.chat_template_path:
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    if data.dataset_format in ("messages", "hh") and tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {model_args.model_name_or_path!r} has no chat template, which "
            f"dataset_format={data.dataset_format!r} needs. Give one: chat_template_path, a .jinja file."
        )
    return tokenizer


def _load_data(args: "SweepConfig", data: SFTDataArguments, tokenizer):
    """The examples to train on; writes the held-out ones."""
    seed = args.data_seed or 0
    with args.main_process_first(desc="examples"):
        examples, held_out = load_examples(data, seed)
        if data.train_tokens is not None:
            # Packing end to end does not truncate.
            longest = None if args.packing and args.packing_strategy == "wrapped" else args.max_length
            budget = parse_tokens(data.train_tokens)
            examples, _ = take_tokens(examples, budget, tokenizer, longest, args.dataset_num_proc)
        if data.rehearsal_share > 0:
            examples = add_rehearsal(examples, data, seed)
    if args.process_index == 0 and len(held_out):
        # Runs of a sweep may write it in parallel.
        folder = Path(args.output_dir).parent
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"held_out.{os.getpid()}"
        held_out.to_json(partial)
        os.replace(partial, folder / "held_out.jsonl")
    return examples


def _train(
    args: "SweepConfig", settings: dict, examples, tokenizer, source: LocalModel, model_args: "ModelConfig"
) -> None:
    from trl import get_peft_config, get_quantization_config

    from .trainer import SweepTrainer

    args.chat_template_path = None  # it is in the tokenizer
    args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = SweepTrainer(
        model=str(source.folder),
        args=args,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.add_callback(CheckpointRecord(args.world_size))
    write_settings(args, settings)
    trainer.train(resume_from_checkpoint=last_complete(args.output_dir))
    trainer.save_model(args.output_dir)
    mark_finished(trainer, **trainer.sam_history.facts())
    # The next run of the sweep needs the memory, and an accelerator with plugins of its own.
    trainer.accelerator.free_memory()
    del trainer
    AcceleratorState._reset_state()
    GradientState._reset_state()
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def _check_space(args: "SweepConfig", source: LocalModel, runs: int) -> None:
    """Raises OSError if the disk has no space for the models and for the checkpoints of one run, in fp32."""
    config = AutoConfig.from_pretrained(str(source.folder))
    width = 4 / (config.dtype.itemsize if config.dtype is not None else 4)
    size = width * sum(path.stat().st_size for path in Path(source.folder).glob("*.safetensors"))
    saves = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    check_disk(
        Path(args.output_dir).parent,
        round(size * (runs + 4 * saves)),
        f"a sweep of {runs} fine-tuned models and the checkpoints of one (save_total_limit)",
    )
