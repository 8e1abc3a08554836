"""`hf-sam sweep`: supervised fine-tuning over a sweep of learning rates, on the datasets of the papers or your own.

Each learning rate gets a folder `lr-*` in --output_dir, beside `held_out.jsonl`, the held-out examples. With `--seeds`
there is a sweep in `seed-*` for each training seed, all on the same examples in another order. A sweep that
was interrupted is resumed by the same command. With `--sam_rho` the fine-tuning itself is sharpness-aware; with
`--use_peft` it trains adapters.
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from ..finetuning import SFTDataArguments, SweepArguments, plan_sweep, run_sweep
from ..finetuning.trainer import SweepConfig
from ..planning import accumulation_for
from ..runtime.config import ConfigParser, DryRunArguments
from ..runtime.distributed import launched_world_size
from .help import group_sam_flags
from .launch import run_or_launch


@dataclass
class PlanArguments(DryRunArguments):
    """What `--dry_run` plans for."""

    dry_run_gpus: int = field(default=1, metadata={"help": "Number of GPUs that --dry_run plans for."})


def make_parser() -> ConfigParser:
    """The parser of the command."""
    classes = (SFTDataArguments, SweepArguments, SweepConfig, ModelConfig, PlanArguments)
    return group_sam_flags(ConfigParser(classes, prog="hf-sam sweep", description=__doc__.split("\n", 1)[0]))


def main(argv: list[str]) -> int:
    """Fine-tune, here or in launched processes; returns the exit status."""
    return run_or_launch("sweep", make_parser(), argv, train)


def train(argv: list[str]) -> int:
    """Fine-tune in this process, or print the plan; returns the exit status."""
    data, sweep, args, model_args, plan_args = make_parser().parse(argv, ignore_unknown=True)
    if plan_args.dry_run:
        print(plan_text(argv))
        return 0
    rates = sweep.learning_rates or [args.learning_rate]
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, sweep.seeds))}: the seeds must be different.")
    for seed in sweep.seeds or [None]:

        def make_args(rate: float, seed: int | None = seed) -> SweepConfig:
            return _arguments_of_run(argv, args, sweep, rate, seed)

        run_sweep(rates, make_args, data, model_args, keep_checkpoints=sweep.keep_checkpoints)
    if args.process_index == 0:
        print(f"The models are in {args.output_dir}.")
    return 0


def plan_text(argv: list[str]) -> str:
    """What a run with these flags needs; see [`~hf_sam.finetuning.plan_sweep`]."""
    data, sweep, args, model_args, plan_args = make_parser().parse(argv, ignore_unknown=True)
    return plan_sweep(
        sweep.learning_rates or [args.learning_rate], data, sweep, args, model_args, plan_args.dry_run_gpus
    )


def _arguments_of_run(
    argv: list[str], args: SweepConfig, sweep: SweepArguments, rate: float, seed: int | None
) -> SweepConfig:
    folder = Path(args.output_dir) / ("" if seed is None else f"seed-{seed}") / f"lr-{rate:g}"
    changed = ["--learning_rate", str(rate), "--output_dir", str(folder)]
    changed += [] if seed is None else ["--seed", str(seed)]
    if sweep.global_batch_size is not None:
        batch = args.per_device_train_batch_size
        accumulation = accumulation_for(sweep.global_batch_size, batch, launched_world_size())
        changed += ["--gradient_accumulation_steps", str(accumulation)]
    return make_parser().parse([*argv, *changed], ignore_unknown=True)[2]
