"""What SAM did in a run: counted, kept in checkpoints, told at the end."""

from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .schedule import SAMWindow

logger = get_logger(__name__)


class SAMHistory(TrainerCallback, ExportableState):
    """Counts the steps in which SAM acted, over interruptions of the run, and tells what came of the settings.

    Attributes:
        acted (`int`): optimizer steps of the run in which SAM perturbed the weights, or skipped a gradient that was not
            finite.
        skipped (`int`): those of them that were skipped, as far as they were logged.
        extra_passes (`float`): passes over all micro-batches of a step that SAM took in addition to plain training.
        steps (`int`): optimizer steps of the run up to its end.
    """

    _COUNTS = ("acted", "skipped", "extra_passes", "steps")

    def __init__(self):
        self._reset()

    def _reset(self):
        self.acted, self.skipped, self.extra_passes, self.steps = 0, 0, 0.0, 0

    def add(self, extra_passes: float) -> None:
        """Count a step of SAM that took so many passes over its micro-batches more than a plain one."""
        self.acted += 1
        self.extra_passes += extra_passes

    @property
    def passes(self) -> float:
        """Passes over the data for each optimizer step of the run; 1 is plain training."""
        return 1 + self.extra_passes / max(1, self.steps)

    def facts(self) -> dict:
        """What training took, for JSON.

        Returns:
            `dict`: `own_steps` of the run, `sam_steps` in which SAM acted, `passes` over the data for each own step.
        """
        return {"own_steps": self.steps, "sam_steps": self.acted, "passes": self.passes}

    def summary(self) -> str:
        """What happened, in a sentence."""
        skipped = f", of which {self.skipped} were skipped (gradient not finite)" if self.skipped else ""
        return f"SAM acted in {self.acted} of {self.steps} steps{skipped}."

    def state(self) -> dict:
        """What the host writes into `trainer_state.json`."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self._COUNTS}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        # What the checkpoint of another run counted, with which this one begins, belongs to that run.
        if stored is not None and state.global_step > getattr(args, "first_step", 0):
            for count, value in stored["attributes"].items():
                setattr(self, count, value)
        # The host writes only what it finds here.
        state.stateful_callbacks[name] = self.state()
        self._warn(args, state)

    def _warn(self, args, state):
        if unused := args.unused_sam_fields():
            logger.warning(
                f"SAM is off: sam_rho is 0, so {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect. "
                "Set sam_rho, e.g. sam_rho=0.05."
            )
        elif args.sam_rho > 0:
            window = SAMWindow.resolve(args, state.max_steps)
            if problem := window.describe_problem(args, state.max_steps):
                logger.warning(problem)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps = state.global_step - getattr(args, "first_step", 0)
        if args.sam_rho > 0 and state.is_world_process_zero:
            print(self.summary())
