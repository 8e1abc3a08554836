"""The optimizer steps in which SAM acts, and the annealing of the learning rate."""

from dataclasses import dataclass

from .arguments import SAMArguments
from .step.counts import ascent_count, resolve_count


@dataclass(frozen=True)
class SAMWindow:
    """The optimizer steps in which SAM acts: `start, start + interval, ...` below `end`.

    Attributes:
        start (`int`): first step, counted as `state.global_step` of `Trainer`.
        end (`int`): end of the window (exclusive).
        interval (`int`): distance of the steps with SAM.
    """

    start: int
    end: int
    interval: int

    @classmethod
    def resolve(cls, args: SAMArguments, max_steps: int) -> "SAMWindow":
        """Compute the window for a run.

        Args:
            args ([`SAMArguments`]): the arguments. With `first_step` (a run that starts from the checkpoint of another
                run), counts and fractions refer to the steps from there on.
            max_steps (`int`): `state.max_steps` of `Trainer`.
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

    def spans(self, step: int) -> bool:
        """Whether a step is between the start and the end of the window."""
        return self.start <= step < self.end

    def __len__(self) -> int:
        return len(range(self.start, self.end, self.interval))

    def describe_problem(self, args: SAMArguments, max_steps: int) -> str | None:
        """A warning, with the remedy, if SAM acts in none or only one step of the run; else `None`."""
        own = max_steps - getattr(args, "first_step", 0)
        if len(self) == 0:
            return (
                f"SAM never acts in this run: its window of steps {self.start} to {self.end} is outside of the {own} "
                f"steps of the run, which end at {max_steps}. Set sam_start_steps and sam_end_steps to fractions of "
                "the run (e.g. 0.75), or train longer."
            )
        if self.interval > 1 and len(self) == 1 and args.largest_radius > 0:
            return (
                f"SAM acts in only one step of this run: sam_interval={self.interval} is too large for its window of "
                f"{self.end - self.start} steps. Lower sam_interval."
            )
        return None


def extra_passes(args: SAMArguments, micro_batches: int) -> float:
    """Passes over the `micro_batches` of a SAM step in addition to a plain step; 1 if the ascent pass uses all."""
    if not args.ascends:
        return 0.0
    return ascent_count(args.sam_ascent_micro_batches, micro_batches) / micro_batches


def annealing_kwargs(args: SAMArguments, max_steps: int, warmup_steps: int) -> dict:
    """Arguments of the `warmup_stable_decay` schedule of `Trainer` for annealing.

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
