"""`hf-sam clm`: train on plain text, from a checkpoint or from scratch, with TRL's trainer and data processing."""

from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
)

from ..runtime.config import ConfigParser
from ..sft import SAMSFTConfig, SAMSFTTrainer
from .help import group_sam_flags
from .launch import run_or_launch
from .training_inputs import load_training_data, parse_arguments


@dataclass(repr=False)
class CLMConfig(SAMSFTConfig):
    """[`SAMSFTConfig`] with defaults for language modeling: texts are concatenated and cut into blocks.

    Parameters:
        from_scratch (`bool`, *optional*, defaults to `False`):
            Start from random weights, with the config and the tokenizer of `model_name_or_path`.
    """

    packing: bool = field(default=True, metadata={"help": "Pack texts into blocks of `max_length` tokens."})
    packing_strategy: str = field(
        default="wrapped",
        metadata={"help": "'wrapped': concatenate all texts and cut them. 'bfd': do not split texts that fit a block."},
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Start from random weights, with the config and tokenizer of the model."},
    )


def make_parser() -> ConfigParser:
    """Create the parser of the command, with TRL's arguments for data and model, and [`CLMConfig`]."""
    classes = (ScriptArguments, CLMConfig, ModelConfig, DatasetMixtureConfig)
    return group_sam_flags(ConfigParser(classes, prog="hf-sam clm"))


def main(argv: list[str]) -> int:
    """Train, here or in launched processes; returns the exit status."""
    return run_or_launch("clm", make_parser(), argv, train)


def train(argv: list[str]) -> int:
    """Train on the column `text` (or `--dataset_text_field`) of a dataset, and save the model.

    Args:
        argv (`list[str]`): flags; `--config FILE` reads flags from YAML.

    Raises:
        ValueError: if the model, data, split or column does not exist; the message lists the alternatives.
        OSError: if the output folder is not writable.
    """
    script_args, args, model_args, mixture = parse_arguments(make_parser(), argv)
    dataset = load_training_data(script_args, args, mixture, [args.dataset_text_field])

    quantization = get_quantization_config(model_args)
    if args.from_scratch:
        if quantization is not None:
            raise ValueError("--from_scratch starts from random weights, which cannot be quantized. Drop one of them.")
        model = _random_model(args, model_args)
    else:
        model = model_args.model_name_or_path
        args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(args.model_init_kwargs or {}),
        }
    trainer = SAMSFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("test"),
        processing_class=AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        ),
        quantization_config=quantization,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18
        trainer.end()
    return 0


def _random_model(args: CLMConfig, model_args: ModelConfig):
    set_seed(args.seed)
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    if model_args.dtype != "auto":
        config.dtype = getattr(torch, model_args.dtype or "float32")
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=model_args.attn_implementation, trust_remote_code=args.trust_remote_code
    )
