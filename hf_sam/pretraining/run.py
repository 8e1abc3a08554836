"""Run a pretraining from its settings to the saved model. Resumes interrupted runs and skips finished ones."""

import os
from pathlib import Path

import torch
import transformers
from accelerate.logging import get_logger
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import get_model_param_count

from ..planning.plan import Plan, measure_model
from ..runtime.checkpoints import last_complete, read_record
from ..runtime.disk import check_disk
from ..runtime.distributed import compute_on_first
from ..runtime.models import LocalModel, find_model
from ..runtime.run_record import decisive_settings, is_finished, mark_finished, write_settings
from ..schedule import SAMWindow, extra_passes
from .arguments import DataArguments, ModelArguments, PretrainingArguments, checkpoint_hash, checkpoint_step
from .data import data_fingerprint, training_data
from .trainer import PretrainingTrainer

logger = get_logger(__name__)


def pretrain(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> str:
    """Train, and save model and tokenizer in `args.output_dir`.

    An interrupted run resumes from its last complete checkpoint. A finished run is not repeated.

    Returns:
        `str`: folder of the model.

    Raises:
        ValueError, OSError: if a setting, data or the disk does not allow the run; raised before training begins.
    """
    data_args.check()
    source = model_source(model_args)
    folder = None if source is None else str(source.folder)
    tokenizer = load_tokenizer(folder, model_args)
    settings = decisive_settings(
        args,
        model_args,
        data_args,
        **args.layout_dependence(),
        sequences=args.sequences,
        weights=None if source is None else source.fingerprint,
        annealed=checkpoint_hash(args.anneal_from),
        data_and_tokenizer=data_fingerprint(data_args, args, tokenizer),
    )
    if is_finished(args, settings):
        logger.info(f"The run in {args.output_dir} is finished.", main_process_only=True)
        return args.output_dir
    config = load_config(folder or model_args.config_name, model_args)
    check_fits(config, tokenizer, args.sequence_length)
    model = make_model(folder, config, model_args, args.seed)
    # With a KV cache, transformers does not detect packed documents from position ids.
    use_cache, model.config.use_cache = model.config.use_cache, False
    check_space(args, model)
    checkpoint = last_complete(args.output_dir)
    data = training_data(
        data_args,
        args,
        tokenizer,
        anneal_position=_position(args.anneal_from) if args.anneal_from else None,
        resume_position=_position(checkpoint) if checkpoint else None,
        step=checkpoint_step(checkpoint) if checkpoint else args.first_step,
    )
    trainer = PretrainingTrainer(model=model, args=args, data=data, processing_class=tokenizer)
    write_settings(args, settings)
    trainer.train(resume_from_checkpoint=checkpoint or args.anneal_from)
    model.config.use_cache = use_cache
    trainer.save_model(args.output_dir)
    mark_finished(trainer, **trainer.sam_history.facts())
    return args.output_dir


def _position(checkpoint: str) -> dict | None:
    return (read_record(checkpoint) or {}).get("data")


def plan(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments, devices: int) -> Plan:
    """Plan a run: tokens, steps, memory and time. Needs the model config, but no weights and no data."""
    place = model_args.config_name or model_args.model_name_or_path
    config = load_config(place, model_args)
    size = measure_model(
        lambda dtype: AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=model_args.trust_remote_code
        ),
        args.per_device_train_batch_size,
        args.sequence_length,
        bf16=args.bf16,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    steps = args.max_steps - args.first_step
    sequences = args.global_batch_size or args.per_device_train_batch_size * devices * args.gradient_accumulation_steps
    return Plan(
        tokens=steps * sequences * args.sequence_length,
        steps=steps,
        sequences=sequences,
        length=args.sequence_length,
        passes=_passes(args, sequences, devices, steps),
        size=size,
        batch=args.per_device_train_batch_size,
        devices=devices,
        average=args.ema_decay is not None,
    )


def _passes(args: PretrainingArguments, sequences: int, devices: int, steps: int) -> float:
    window = SAMWindow.resolve(args, args.max_steps)
    micro_batches = max(1, sequences // (args.per_device_train_batch_size * devices))
    return 1 + len(window) / steps * extra_passes(args, micro_batches)


def model_source(model_args: ModelArguments) -> LocalModel | None:
    """Find the model to start from, downloaded if needed; None for random weights.

    Raises:
        ValueError, OSError: see [`~hf_sam.runtime.models.find_model`].
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        if model_args.config_name is None:
            raise ValueError(
                "Say which model to train: set model_name_or_path (starts from its weights) or config_name (starts "
                "from random weights)."
            )
        return None
    return find_model(name if os.path.isdir(name) or not revision else f"{name}@{revision}")


def load_config(place: str | None, model_args: ModelArguments):
    """Load a model config from a file, a folder, or the Hub."""
    if place is None:
        raise ValueError("Say which model to train: set model_name_or_path or config_name.")
    revision = None if os.path.exists(place) else model_args.model_revision
    try:
        return AutoConfig.from_pretrained(
            place, revision=revision or "main", trust_remote_code=model_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no model config in {place!r}: {error}") from error


def load_tokenizer(source: str | None, model_args: ModelArguments):
    """Load the tokenizer `tokenizer_name`, or that of the model."""
    place = model_args.tokenizer_name or source
    if place is None:
        raise ValueError("A model from scratch needs a tokenizer. Set tokenizer_name to a folder or a Hub id.")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no tokenizer {place!r}: {error}") from error


def check_fits(config, tokenizer, length: int) -> None:
    """Raises ValueError if rows are longer than the context of the model, or the tokenizer has more tokens."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"sequence_length={length} is more than the {longest} positions of the model. Lower sequence_length."
        )
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {text.vocab_size}. Use the tokenizer of "
            "the model, or a config with a larger vocab_size."
        )


def check_space(args: PretrainingArguments, model) -> None:
    """Raises OSError if the disk has no space for the remaining checkpoints and the model.

    A checkpoint holds weights and two moments in fp32; sharded strategies write the weights twice.
    """
    weights = 4 * get_model_param_count(model)
    checkpoint = (4 if args.ema_decay is None else 5) * weights
    saves = 0 if args.save_strategy == "no" else _checkpoints(args)
    existing = len(list(Path(args.output_dir).glob("checkpoint-*")))
    what = f"the model and {saves} checkpoint{'' if saves == 1 else 's'} of it (save_steps, save_total_limit)"
    compute_on_first(lambda: check_disk(args.output_dir, weights + max(0, saves - existing) * checkpoint, what))


def _checkpoints(args: PretrainingArguments) -> int:
    steps = args.max_steps - args.first_step
    every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * args.max_steps))
    most = -(-steps // every) if args.save_strategy == "steps" else 1
    # The oldest checkpoint is deleted after the newest is saved.
    return int(min(most, (args.save_total_limit or most) + 1))


def make_model(source: str | None, config, model_args: ModelArguments, seed: int):
    """Create the model in fp32, since 16-bit weights would lose the SAM perturbation and small updates."""
    if source is None:
        transformers.set_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
        )
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
    )
