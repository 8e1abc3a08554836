"""The record of a training run in its output folder: which settings it has, and whether it is finished.

The settings are written when the run begins, so that the same command resumes it and a command with other settings is
refused. When the run ends, a second file marks it as finished.
"""

import dataclasses
import json
from pathlib import Path

from transformers import TrainingArguments

from .disk import finite, write_json
from .distributed import broadcast

SETTINGS, FINISHED = "run_settings.json", "training_done.json"

# The settings of the host that decide where training ends. How the work is distributed and logged does not.
_DECISIVE = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "average_tokens_across_devices"),
    *("dataloader_drop_last", "optim_target_modules"),
)
_NOT_DECISIVE = {"dataset_num_proc", "preprocessing_num_workers", "eval_packing", "sequences", "dry_run_gpus"}


def decisive_settings(args: TrainingArguments, *others, **facts) -> dict:
    """The settings that decide where a run ends, for JSON.

    Args:
        args ([`~transformers.TrainingArguments`]): of the fields of the host, the decisive ones are taken; of the
            fields that a subclass adds, all.
        others: more dataclasses, whose fields are all taken.
        facts: anything else, such as a fingerprint of the weights that the run begins with.
    """
    host = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {name: getattr(args, name) for name in _DECISIVE if hasattr(args, name)}
    for one in (args, *others):
        for field in dataclasses.fields(one):
            if field.name not in host | _NOT_DECISIVE:
                found[field.name] = getattr(one, field.name)
    return json.loads(json.dumps(finite(found | facts), default=str, sort_keys=True))


def write_settings(args: TrainingArguments, settings: dict) -> None:
    """Write the settings of a run that begins, for [`is_finished`]."""
    if args.process_index == 0:
        write_json(Path(args.output_dir) / SETTINGS, settings)


def is_finished(args: TrainingArguments, settings: dict) -> bool:
    """Whether the output folder holds this run, and the run is finished; the same on all processes.

    Raises:
        ValueError: if the folder holds checkpoints or the model of a run with other settings; the message lists them.
    """
    # Rank 0 decides for all, because it alone wrote the record.
    finished, problem = broadcast(_look(args.output_dir, settings) if args.process_index == 0 else None)
    if problem:
        raise ValueError(problem)
    return finished


def _look(output_dir: str, settings: dict) -> tuple[bool, str | None]:
    """Whether a folder holds the finished run, and what is wrong with its content."""
    folder = Path(output_dir)
    finished = (folder / FINISHED).exists()
    if not finished and not list(folder.glob("checkpoint-*")):
        return False, None
    before = read_json(folder / SETTINGS)
    if before is None:
        return False, f"output_dir={output_dir!r} holds checkpoints of another program. Choose another folder."
    if before != settings:
        changed = [
            f"{name} {before.get(name)!r} -> {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        return False, (
            f"output_dir={output_dir!r} holds a run with other settings ({', '.join(changed)}). Choose another folder, "
            "or remove that one."
        )
    return finished, None


def mark_finished(trainer, **facts) -> None:
    """Mark the run of a trainer as finished, for [`is_finished`].

    Args:
        trainer ([`~transformers.Trainer`]): after training.
        facts: what to write beside its number of `steps`, such as what training took; for JSON.
    """
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / FINISHED
        write_json(path, {"steps": trainer.state.global_step, **facts})
    trainer.accelerator.wait_for_everyone()


def read_finished(folder: str | Path) -> dict | None:
    """What [`mark_finished`] wrote into a folder; None if the folder holds no finished run."""
    return read_json(Path(folder) / FINISHED)


def read_json(path: Path) -> dict | None:
    """The content of a JSON file; None if there is no such file or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
