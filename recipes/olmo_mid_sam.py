"""Pretraining, annealing and mid-training with SAM: OLMo-2-1B on Dolmino, or any size on any text.

    accelerate launch recipes/olmo_mid_sam.py --config recipes/configs/olmo2_1b_mid/sam.yaml
    python recipes/olmo_mid_sam.py --config recipes/configs/olmo2_1b_mid/sam.yaml --dry_run

A run that was interrupted, even by a kill in the middle of a checkpoint, goes on when the same command is given again,
with the row of data that it would have seen next. A run that is done is left alone.
"""

import sys
from dataclasses import dataclass, field

from configuration import RecipeParser

from hf_sam.commands.reporting import command
from hf_sam.pretraining import DataArguments, ModelArguments, PretrainingArguments, plan, pretrain


@dataclass
class PlanArguments:
    """What `--dry_run` reckons with."""

    dry_run_gpus: int = field(default=8, metadata={"help": "Number of GPUs that --dry_run reckons with."})


def make_parser() -> RecipeParser:
    """The parser of this recipe."""
    classes = (ModelArguments, DataArguments, PretrainingArguments, PlanArguments)
    return RecipeParser(classes, prog="olmo_mid_sam.py", description=__doc__.split("\n", 1)[0])


@command
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    model_args, data_args, args, plan_args, dry_run = make_parser().parse(argv)
    if dry_run:
        print(plan(model_args, data_args, args, plan_args.dry_run_gpus).text())
        return 0
    folder = pretrain(model_args, data_args, args)
    if args.process_index == 0:
        print(f"The model is in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
