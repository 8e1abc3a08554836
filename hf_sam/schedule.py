"""When SAM acts and when the learning rate anneals, in optimizer steps."""

from dataclasses import dataclass

from .arguments import SAMArguments
from .step.counts import ascent_count, resolve_count
from .step.variants import VARIANTS


@dataclass(frozen=True)
class SAMWindow:
    """The optimizer steps in which SAM acts: `start, start + interval, ...` below `end`, counted as the host does."""

    start: int
    end: int
    interval: int

    @classmethod
    def resolve(cls, args: SAMArguments, max_steps: int) -> "SAMWindow":
        """Window that `args` ask for.

        Args:
            args ([`SAMArguments`]): where they have a `first_step` (a run that begins with the checkpoint of another
                one), counts and shares are those of the steps from there on.
            max_steps (`int`): the host's count at the end of the run.
        """
        first = getattr(args, "first_step", 0)
        own = max_steps - first
        start = first + resolve_count(args.sam_start_steps, own)
        end = max_steps if args.sam_end_steps is None else first + resolve_count(args.sam_end_steps, own)
        if args.sam_phase == "anneal":
            start = max(start, max_steps - resolve_count(args.anneal_steps, max_steps))
        return cls(start=start, end=min(end, max_steps), interval=args.sam_interval)

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.end and (step - self.start) % self.interval == 0

    def __len__(self) -> int:
        return len(range(self.start, self.end, self.interval))

    def describe_problem(self, args: SAMArguments, max_steps: int) -> str | None:
        """What keeps SAM from acting as `args` seem to want it to, and the remedy; `None` if nothing does."""
        own = max_steps - getattr(args, "first_step", 0)
        if len(self) == 0:
            return (
                f"SAM never acts in this run: its window of steps {self.start} to {self.end} is outside of the {own} "
                f"steps of the run, which end at {max_steps}. Set sam_start_steps and sam_end_steps to shares of the "
                "run (0.75), or train longer."
            )
        if self.interval > 1 and len(self) == 1:
            return (
                f"SAM acts in one step of this run only: sam_interval={self.interval} is longer than its window of "
                f"{self.end - self.start} steps. Lower sam_interval."
            )
        return None


def extra_passes(args: SAMArguments, micro_batches: int) -> float:
    """What a step with SAM takes beyond a plain one, in passes over its `micro_batches`: 1 for a whole ascent pass."""
    share = ascent_count(args.sam_ascent_micro_batches, micro_batches) / micro_batches
    return (VARIANTS[args.sam_variant].passes - 1) * share


def annealing_kwargs(args: SAMArguments, max_steps: int, warmup_steps: int) -> dict:
    """Arguments of the host's `warmup_stable_decay` schedule for the annealing that `args` ask for.

    Args:
        args ([`SAMArguments`]): with `anneal_steps` set.
        max_steps (`int`): number of optimizer steps of the run.
        warmup_steps (`int`): number of warmup steps.

    Raises:
        ValueError: if warmup and annealing do not fit into the run.
    """
    decay_steps = resolve_count(args.anneal_steps, max_steps)
    if warmup_steps + decay_steps > max_steps:
        raise ValueError(
            f"anneal_steps={args.anneal_steps:g} ({decay_steps} steps) and the warmup of {warmup_steps} steps do not "
            f"fit into a run of {max_steps} steps. Shorten one of them, or train longer."
        )
    return {
        "num_decay_steps": decay_steps,
        "decay_type": args.anneal_type,
        "min_lr_ratio": args.anneal_min_lr_ratio,
    }
