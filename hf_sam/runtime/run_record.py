"""What a run leaves beside its weights, so that the same command goes on with it, and another one does not by mistake.

The output folder gets a record of the settings when the run begins, and a mark when it is done. Each checkpoint gets,
in the last file that the host writes of it, how many processes wrote it and where the data stood.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from .disk import finite, write_json
from .distributed import broadcast

RECORD, DONE = "run_settings.json", "training_done.json"

# Of the host's settings, those that decide where training ends up; how it is shared out and logged does not.
_DECISIVE = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "average_tokens_across_devices"),
    *("dataloader_drop_last", "optim_target_modules"),
)
_NOT_DECISIVE = {"dataset_num_proc", "preprocessing_num_workers", "eval_packing", "sequences", "dry_run_gpus"}


def decisive_settings(args: TrainingArguments, *others, **facts) -> dict:
    """The settings that decide where a run ends up, for JSON.

    Args:
        args ([`~transformers.TrainingArguments`]): of those, the host's own are chosen from, others are all taken.
        others: more dataclasses.
        facts: anything else, such as a hash of the weights that the run begins with.
    """
    host = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {name: getattr(args, name) for name in _DECISIVE if hasattr(args, name)}
    for one in (args, *others):
        for field in dataclasses.fields(one):
            if field.name not in host | _NOT_DECISIVE:
                found[field.name] = getattr(one, field.name)
    if args.sam_rho > 0 and (args.sam_ascent_sync == "local" or args.sam_ascent_micro_batches is not None):
        # The ascent is then another one on other processes or micro-batches.
        found |= {"world_size": args.world_size, "per_device_train_batch_size": args.per_device_train_batch_size}
    return json.loads(json.dumps(finite(found | facts), default=str, sort_keys=True))


def is_done(args: TrainingArguments, settings: dict) -> bool:
    """Whether the output folder holds this run, through to its end.

    Raises:
        ValueError: if it holds checkpoints or the model of a run with other settings; the message says which.
    """
    # The first process decides for all: only it wrote the record.
    done, problem = broadcast(_look(args.output_dir, settings) if args.process_index == 0 else None)
    if problem:
        raise ValueError(problem)
    return done


def _look(output_dir: str, settings: dict) -> tuple[bool, str | None]:
    """Whether a folder holds the run, through to its end, and what is wrong with what it holds."""
    folder = Path(output_dir)
    done = (folder / DONE).exists()
    if not done and not list(folder.glob("checkpoint-*")):
        return False, None
    before = _read(folder / RECORD)
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
    return done, None


def write_settings(args: TrainingArguments, settings: dict) -> None:
    """Write down the settings of a run that begins, for [`is_done`]."""
    if args.process_index == 0:
        write_json(Path(args.output_dir) / RECORD, settings)


def mark_done(trainer) -> None:
    """Leave the mark that [`is_done`] looks for, with what the training of a [`SAMMixin`] took."""
    if trainer.is_world_process_zero():
        history = trainer.sam_history
        write_json(
            Path(trainer.args.output_dir) / DONE,
            {
                "steps": trainer.state.global_step,
                "own_steps": history.steps,
                "sam_steps": history.acted,
                "passes": history.passes,
            },
        )
    trainer.accelerator.wait_for_everyone()


def read_done(folder: str | Path) -> dict | None:
    """What [`mark_done`] wrote: `steps` by the host's count, `own_steps` of the run, `sam_steps` in which SAM acted,
    and `passes` over the data for each of its own steps (1 is plain training); None if it wrote nothing."""
    return _read(Path(folder) / DONE)


class CheckpointRecord(TrainerCallback, ExportableState):
    """Writes into `trainer_state.json`, the last file of a checkpoint, what is needed to go on from it.

    Args:
        world_size (`int`): processes, each of which writes a file of its own.
        position (`Callable[[], dict]`, *optional*): tells where the data stands.
    """

    def __init__(self, world_size: int, position: Callable[[], dict] | None = None):
        self._world_size, self._position = world_size, position

    def on_train_begin(self, args, state, control, **kwargs):
        # The checkpoint that a run begins with may be from a trainer without this callback.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict:
        """What the host writes."""
        data = self._position() if self._position is not None else None
        return {"args": {}, "attributes": {"world_size": self._world_size, "data": data}}


def read_record(checkpoint: str | Path) -> dict | None:
    """What [`CheckpointRecord`] wrote; None if it wrote nothing."""
    state = _read(Path(checkpoint) / "trainer_state.json") or {}
    stored = state.get("stateful_callbacks", {}).get(CheckpointRecord.__name__)
    if isinstance(stored, list):
        stored = stored[-1]
    return None if stored is None else stored["attributes"]


def last_complete(output_dir: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None; the same on all processes.

    A checkpoint that was interrupted lacks its last file, or that of a process. The files of all processes are looked
    for, so checkpoints must be on a disk that all nodes share.
    """
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_complete(folder):
            steps[int(step)] = str(folder)
    return broadcast(steps[max(steps)] if steps else None)


def _is_complete(folder: Path) -> bool:
    record = read_record(folder)
    if record is None:
        return False
    world = record["world_size"]
    names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    return all((folder / name).exists() for name in names)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
