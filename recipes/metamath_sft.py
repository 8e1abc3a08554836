"""Supervised fine-tuning over a sweep of learning rates: MetaMathQA and the other sets of the papers.

    accelerate launch recipes/metamath_sft.py --config recipes/configs/sft/metamath.yaml \
        --model_name_or_path outputs/olmo2_1b_mid/sam --output_dir outputs/sft/sam

Each learning rate gets a folder `lr-*` in --output_dir, beside `held_out.jsonl`, the examples that learning is measured
on. A sweep that was interrupted goes on when the same command is given again. With `--sam_rho` the fine-tuning itself
is sharpness-aware; with `--use_peft` it trains adapters.
"""

import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from configuration import RecipeParser
from sft_data import SFTDataArguments, load_examples, rehearsed, up_to
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_sam import SAMSFTConfig, SAMSFTTrainer
from hf_sam.commands.reporting import command
from hf_sam.planning import Plan, accumulation_for, measure_model, parse_tokens
from hf_sam.runtime.checkpoints import CheckpointRecord, last_complete
from hf_sam.runtime.dataset_specs import local_files
from hf_sam.runtime.disk import check_disk
from hf_sam.runtime.models import LocalModel, find_model
from hf_sam.runtime.run_record import decisive_settings, is_finished, mark_finished, write_settings


@dataclass
class SweepArguments:
    """Which runs there are.

    Parameters:
        learning_rates (`list[float]`): one run for each.
        global_batch_size (`int`, *optional*): sequences of an optimizer step over all devices.
        keep_checkpoints (`bool`): keep the checkpoints of a run that is through, with its optimizer state.
        dry_run_gpus (`int`): number of GPUs that `--dry_run` reckons with.
    """

    learning_rates: list[float] = field(default_factory=list, metadata={"help": "One run for each."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of an optimizer step over all devices."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep the checkpoints of a run that is through, not only its model."}
    )
    dry_run_gpus: int = field(default=1, metadata={"help": "Number of GPUs that --dry_run reckons with."})


def make_parser() -> RecipeParser:
    """The parser of this recipe."""
    classes = (SFTDataArguments, SweepArguments, SAMSFTConfig, ModelConfig)
    return RecipeParser(classes, prog="metamath_sft.py", description=__doc__.split("\n", 1)[0])


@command
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    data, sweep, args, model_args, dry_run = make_parser().parse(argv)
    rates = sweep.learning_rates or [args.learning_rate]
    if any(rate <= 0 for rate in rates):
        raise ValueError(f"learning_rates={rates} must be larger than 0.")
    data.check()
    if model_args.model_name_or_path is None:
        raise ValueError("Say which model to fine-tune: model_name_or_path, a folder or an id of the hub.")
    if dry_run:
        print(_plan(data, sweep, args, model_args, len(rates)))
        return 0
    name = model_args.model_name_or_path
    revision = model_args.model_revision
    at = f"@{revision}" if revision not in (None, "main") and not os.path.isdir(name) else ""
    source = find_model(f"{name}{at}")
    # Arguments are made anew for each run when its turn comes: the host keeps what the last ones ask for.
    make = functools.partial(_run_arguments, argv, args, sweep)
    missing = [rate for rate in rates if not is_finished(run := make(rate), _settings(run, data, model_args, source))]
    if missing:
        if not model_args.use_peft:
            _check_space(args, str(source.folder), len(missing))
        _train_all(missing, make, data, source, model_args, sweep.keep_checkpoints)
    if args.process_index == 0:
        print(f"The models are in {args.output_dir}.")
    return 0


def _run_arguments(argv: list[str], args: SAMSFTConfig, sweep: SweepArguments, rate: float) -> SAMSFTConfig:
    """The settings of one run of the sweep."""
    changed = ["--learning_rate", str(rate), "--output_dir", str(Path(args.output_dir) / f"lr-{rate:g}")]
    if sweep.global_batch_size is not None:
        accumulation = accumulation_for(
            sweep.global_batch_size, args.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
        )
        changed += ["--gradient_accumulation_steps", str(accumulation)]
    return make_parser().parse([*argv, *changed])[2]


def _settings(args: SAMSFTConfig, data: SFTDataArguments, model_args: ModelConfig, source: LocalModel) -> dict:
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    sequences = args.per_device_train_batch_size * devices * args.gradient_accumulation_steps
    files = [local_files(spec) for spec in (data.dataset, data.rehearsal_data) if spec]
    facts = {**args.layout_dependence(), "sequences": sequences, "weights": source.fingerprint, "files": files}
    return decisive_settings(args, data, model_args, **facts)


def _train_all(
    rates: list[float],
    make: Callable[[float], SAMSFTConfig],
    data: SFTDataArguments,
    source: LocalModel,
    model_args: ModelConfig,
    keep: bool,
) -> None:
    first = make(rates[0])
    folder = str(source.folder)
    if first.n_gpu > 1:
        raise ValueError(
            f"One process has {first.n_gpu} GPUs. Start one process for each (accelerate launch SCRIPT ...), or show "
            "it one: CUDA_VISIBLE_DEVICES=0."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if first.chat_template_path:
        tokenizer.chat_template = Path(first.chat_template_path).read_text(encoding="utf-8")
    if data.dataset_format in ("messages", "hh") and tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {model_args.model_name_or_path!r} has no chat template, which "
            f"dataset_format={data.dataset_format!r} needs. Give one: chat_template_path, a .jinja file."
        )
    with first.main_process_first(desc="examples"):
        examples, held_out = load_examples(data, first.data_seed or 0)
        if data.train_tokens is not None:
            workers = first.dataset_num_proc
            # What is packed end to end is not cut.
            longest = None if first.packing and first.packing_strategy == "wrapped" else first.max_length
            examples, _ = up_to(examples, parse_tokens(data.train_tokens), tokenizer, longest, workers)
        if data.rehearsal_share > 0:
            examples = rehearsed(examples, data, first.data_seed or 0)
    if first.process_index == 0 and len(held_out):
        Path(first.output_dir).parent.mkdir(parents=True, exist_ok=True)
        held_out.to_json(Path(first.output_dir).parent / "held_out.jsonl")
    for rate in rates:
        args = make(rate)
        settings = _settings(args, data, model_args, source)
        _train(args, settings, examples, tokenizer, folder, model_args)
        if not keep and args.process_index == 0:
            for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)


def _train(args: SAMSFTConfig, settings: dict, examples, tokenizer, folder: str, model_args: ModelConfig) -> None:
    args.chat_template_path = None  # it is in the tokenizer
    args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = SAMSFTTrainer(
        model=folder,
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


def _check_space(args: SAMSFTConfig, folder: str, runs: int) -> None:
    """Raises OSError if the disk has no space for the models and for the checkpoints of one run, in fp32."""
    config = AutoConfig.from_pretrained(folder)
    width = 4 / (config.dtype.itemsize if config.dtype is not None else 4)
    size = width * sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    saves = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    check_disk(
        args.output_dir,
        round(size * (runs + 4 * saves)),
        f"a sweep of {runs} fine-tuned models and the checkpoints of one (save_total_limit)",
    )


def _plan(data: SFTDataArguments, sweep: SweepArguments, args: SAMSFTConfig, model_args: ModelConfig, runs: int) -> str:
    name = model_args.model_name_or_path
    revision = "main" if os.path.exists(name) else model_args.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision)
    length = args.max_length or config.get_text_config().max_position_embeddings
    size = measure_model(
        lambda dtype: AutoModelForCausalLM.from_config(config, dtype=dtype),
        args.per_device_train_batch_size,
        length,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    sequences = sweep.global_batch_size or args.per_device_train_batch_size * sweep.dry_run_gpus
    if args.max_steps > 0:
        tokens = args.max_steps * sequences * length
    elif data.train_tokens is not None:
        tokens = parse_tokens(data.train_tokens)
    else:
        tokens = sequences * length  # all of the data, which is not known before it is read
    plan = Plan(
        tokens=tokens,
        steps=-(-tokens // (sequences * length)),
        sequences=sequences,
        length=length,
        passes=2.0,
        size=size,
        batch=args.per_device_train_batch_size,
        devices=sweep.dry_run_gpus,
    )
    whole = args.max_steps > 0 or data.train_tokens is not None
    what = f"one of {runs} runs" if whole else "one step, of as many as the data has (there is no train_tokens)"
    return (
        f"{plan.text()}\n\nThat is {what}, all weights trained, if every sequence were of full length; shorter ones "
        "take more steps and less memory."
    )


if __name__ == "__main__":
    sys.exit(main())
