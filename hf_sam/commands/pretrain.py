"""`hf-sam pretrain`: pretraining, annealing and mid-training on text, with budgets in tokens.

A run that was interrupted, even by SIGKILL while it wrote a checkpoint, is resumed by the same command, with the row of
data that it would have read next. A finished run is left alone.
"""

from dataclasses import dataclass, field

from ..pretraining import DataArguments, ModelArguments, PretrainingArguments, plan, pretrain
from ..runtime.config import ConfigParser, DryRunArguments
from .help import group_sam_flags
from .launch import run_or_launch


@dataclass
class PlanArguments(DryRunArguments):
    """What `--dry_run` plans for."""

    dry_run_gpus: int = field(default=8, metadata={"help": "Number of GPUs that --dry_run plans for."})


def make_parser() -> ConfigParser:
    """The parser of the command."""
    classes = (ModelArguments, DataArguments, PretrainingArguments, PlanArguments)
    return group_sam_flags(ConfigParser(classes, prog="hf-sam pretrain", description=__doc__.split("\n", 1)[0]))


def main(argv: list[str]) -> int:
    """Train, here or in launched processes; returns the exit status."""
    return run_or_launch("pretrain", make_parser(), argv, train)


def train(argv: list[str]) -> int:
    """Train in this process, or print the plan; returns the exit status."""
    model_args, data_args, args, plan_args = make_parser().parse(argv, ignore_unknown=True)
    if plan_args.dry_run:
        print(plan_text(argv))
        return 0
    folder = pretrain(model_args, data_args, args)
    if args.process_index == 0:
        print(f"The model is in {folder}.")
    return 0


def plan_text(argv: list[str]) -> str:
    """What a run with these flags needs; see [`~hf_sam.pretraining.plan`]."""
    model_args, data_args, args, plan_args = make_parser().parse(argv, ignore_unknown=True)
    return plan(model_args, data_args, args, plan_args.dry_run_gpus).text()
