"""Supervised fine-tuning over a sweep of learning rates: MetaMathQA and the other sets of the papers.

    accelerate launch recipes/metamath_sft.py --config recipes/configs/sft/metamath.yaml \
        --model_name_or_path outputs/olmo2_1b_mid/sam --output_dir outputs/sft/sam

Each learning rate gets a folder `lr-*` in --output_dir, beside `held_out.jsonl`, the examples that learning is measured
on. A sweep that was interrupted goes on when the same command is given again. With `--sam_rho` the fine-tuning itself
is sharpness-aware; with `--use_peft` it trains adapters.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from configuration import RecipeParser, told
from sft_data import SFTDataArguments, load_examples, rehearsed, up_to
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_sam import SAMSFTConfig, SAMSFTTrainer
from hf_sam.evaluation.sources import find_model
from hf_sam.pretraining import Plan, accumulation_for, last_complete, measure_model, parse_tokens
from hf_sam.pretraining.run import is_done, mark_done
from hf_sam.resources import check_disk


@dataclass
class SweepArguments:
    """Which runs there are.

    Parameters:
        learning_rates (`list[float]`): one run for each.
        global_batch_size (`int`, *optional*): sequences of an optimizer step over all devices.
        dry_run_gpus (`int`): number of GPUs that `--dry_run` reckons with.
    """

    learning_rates: list[float] = field(default_factory=list, metadata={"help": "One run for each."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of an optimizer step over all devices."}
    )
    dry_run_gpus: int = field(default=1, metadata={"help": "Number of GPUs that --dry_run reckons with."})


def make_parser() -> RecipeParser:
    """The parser of this recipe."""
    classes = (SFTDataArguments, SweepArguments, SAMSFTConfig, ModelConfig)
    return RecipeParser(classes, prog="metamath_sft.py", description=__doc__.split("\n", 1)[0])


@told
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
    folder = str(find_model(f"{name}{at}").folder)
    _check_space(args, folder)
    runs = [_run_arguments(argv, args, sweep, rate) for rate in rates]
    runs = [run for run in runs if not is_done(run)]
    if runs:
        _train_all(runs, data, folder, model_args)
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


def _train_all(runs: list[SAMSFTConfig], data: SFTDataArguments, folder: str, model_args: ModelConfig) -> None:
    first = runs[0]
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
            examples, _ = up_to(examples, parse_tokens(data.train_tokens), tokenizer, first.max_length, workers)
        if data.rehearsal_share > 0:
            examples = rehearsed(examples, data, first.data_seed or 0)
    if first.process_index == 0 and len(held_out):
        Path(first.output_dir).parent.mkdir(parents=True, exist_ok=True)
        held_out.to_json(Path(first.output_dir).parent / "held_out.jsonl")
    for args in runs:
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
        trainer.train(resume_from_checkpoint=last_complete(args.output_dir, args.world_size))
        trainer.save_model(args.output_dir)
        mark_done(trainer, args)
        trainer.accelerator.free_memory()


def _check_space(args: SAMSFTConfig, folder: str) -> None:
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    saves = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    check_disk(args.output_dir, size * (1 + 3 * saves), "a fine-tuned model and its checkpoints (save_total_limit)")


def _plan(data: SFTDataArguments, sweep: SweepArguments, args: SAMSFTConfig, model_args: ModelConfig, runs: int) -> str:
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    length = args.max_length or config.get_text_config().max_position_embeddings
    size = measure_model(
        lambda: AutoModelForCausalLM.from_config(config),
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
        raise ValueError("A plan of a fine-tuning run takes a budget: train_tokens, e.g. 50M, or max_steps.")
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
    return (
        f"{plan.text()}\n\nThat is one of {runs} runs, all weights trained, if every sequence were of full length; "
        "shorter ones take more steps and less memory."
    )


if __name__ == "__main__":
    sys.exit(main())
