"""What a run of a sweep takes: tokens, steps, memory and time."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModelForCausalLM

from ..planning import Plan, measure_model, parse_tokens
from .settings import SFTDataArguments, SweepArguments
from .sweep import check_inputs

if TYPE_CHECKING:
    from trl import ModelConfig

    from .trainer import SweepConfig


def plan_sweep(
    rates: Sequence[float],
    data: SFTDataArguments,
    sweep: SweepArguments,
    args: "SweepConfig",
    model_args: "ModelConfig",
    devices: int,
) -> str:
    """The plan of one run, as text; loads the configuration of the model, no weights and no data.

    Args:
        rates (`Sequence[float]`): the learning rates.
        data, sweep, args, model_args: the settings of the sweep.
        devices (`int`): number of devices that a run uses.

    Raises:
        ValueError: if a setting is missing or out of range.
    """
    check_inputs(rates, data, model_args)
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
    sequences = sweep.global_batch_size or args.per_device_train_batch_size * devices
    if args.max_steps > 0:
        tokens = args.max_steps * sequences * length
    elif data.train_tokens is not None:
        tokens = parse_tokens(data.train_tokens)
    else:
        tokens = sequences * length  # the size of the data is not known before it is read
    plan = Plan(
        tokens=tokens,
        steps=-(-tokens // (sequences * length)),
        sequences=sequences,
        length=length,
        passes=2.0,
        size=size,
        batch=args.per_device_train_batch_size,
        devices=devices,
    )
    known = args.max_steps > 0 or data.train_tokens is not None
    what = (
        f"one of {len(rates)} runs" if known else "one step; the number of steps depends on the data (no train_tokens)"
    )
    return (
        f"{plan.text()}\n\nThis is {what}, with all weights trained and every sequence of full length; shorter "
        "sequences take more steps and less memory."
    )
