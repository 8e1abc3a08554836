"""The record of a training run in its output folder: its settings, and whether it is finished.

The settings are written when training begins: the same command then resumes the run, and a command with other settings
is refused. When training ends, a second file marks the run as finished.
"""

import dataclasses
import json
from pathlib import Path

from transformers import TrainingArguments

from .disk import finite, read_json, write_json
from .distributed import broadcast

SETTINGS, FINISHED = "run_settings.json", "training_done.json"

# Fields of `TrainingArguments` that change the trained weights. Distribution and logging do not.
_DECISIVE = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "average_tokens_across_devices"),
    *("dataloader_drop_last", "optim_target_modules"),
)
_NOT_DECISIVE = {"dataset_num_proc", "preprocessing_num_workers", "eval_packing", "sequences", "dry_run_gpus"}


def decisive_settings(args: TrainingArguments, *others, **facts) -> dict:
    """Collect the settings that change the trained weights, for JSON.

    Args:
        args ([`~transformers.TrainingArguments`]): the decisive fields of `TrainingArguments`, and all fields that a
            subclass adds.
        others: more dataclasses; all their fields.
        facts: other entries, such as a fingerprint of the initial weights.
    """
    host = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {name: getattr(args, name) for name in _DECISIVE if hasattr(args, name)}
    for one in (args, *others):
        for field in dataclasses.fields(one):
            if field.name not in host | _NOT_DECISIVE:
                found[field.name] = getattr(one, field.name)
    return json.loads(json.dumps(finite(found | facts), default=str, sort_keys=True))


def write_settings(args: TrainingArguments, settings: dict) -> None:
    """Write the settings of a new run, for [`is_finished`]."""
    if args.process_index == 0:
        write_json(Path(args.output_dir) / SETTINGS, settings)


def is_finished(args: TrainingArguments, settings: dict) -> bool:
    """Whether the output folder holds this run, finished; the same on all processes.

    Raises:
        ValueError: if the folder holds checkpoints or the model of a run with other settings; the message lists them.
    """
    # Rank 0 wrote the record, so it decides for all ranks.
    finished, problem = broadcast(_look(args.output_dir, settings) if args.process_index == 0 else None)
    if problem:
        raise ValueError(problem)
    return finished


def _look(output_dir: str, settings: dict) -> tuple[bool, str | None]:
    """Whether a folder holds the finished run, and a description of the problem if it cannot be used."""
    folder = Path(output_dir)
    finished = (folder / FINISHED).exists()
    if not finished and not list(folder.glob("checkpoint-*")):
        return False, None
    before = read_json(folder / SETTINGS)
    if before is None:
        return False, f"output_dir={output_dir!r} holds checkpoints of another program. Choose another folder."
    changed = [
        f"{name} {before.get(name)!r} -> {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)  # a setting that an older version did not know is None
    ]
    if changed:
        return False, (
            f"output_dir={output_dir!r} holds a run with other settings ({', '.join(changed)}). Choose another folder, "
            "or remove that one."
        )
    return finished, None


def mark_finished(trainer, **facts) -> None:
    """Mark the run of a trainer as finished, for [`is_finished`].

    Args:
        trainer ([`~transformers.Trainer`]): after training.
        facts: JSON values to write in addition to the number of `steps`, such as the cost of training.
    """
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / FINISHED
        write_json(path, {"steps": trainer.state.global_step, **facts})
    trainer.accelerator.wait_for_everyone()


def read_finished(folder: str | Path) -> dict | None:
    """Read the record of [`mark_finished`]; None if the folder holds no finished run."""
    return read_json(Path(folder) / FINISHED)
