"""Counts of the SAM steps of a run, saved in checkpoints and printed at the end."""

from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .schedule import SAMWindow

logger = get_logger(__name__)


class SAMHistory(TrainerCallback, ExportableState):
    """Counts the SAM steps of a run, also over interruptions, and warns about settings without effect.

    Attributes:
        acted (`int`): optimizer steps with SAM, including skipped ones.
        noisy (`int`): optimizer steps with `sam_noise`.
        skipped (`int`): SAM steps that were logged with a non-finite ascent gradient, and therefore not perturbed.
        extra_passes (`float`): passes over the micro-batches of a step in addition to plain training.
        steps (`int`): optimizer steps of the finished run.
    """

    _COUNTS = ("acted", "noisy", "skipped", "extra_passes", "steps")

    def __init__(self):
        self._reset()

    def _reset(self):
        self.acted, self.noisy, self.skipped, self.extra_passes, self.steps = 0, 0, 0, 0.0, 0

    def add(self, extra_passes: float, moved: bool = True, noise: bool = False) -> None:
        """Count a step at perturbed weights.

        Args:
            extra_passes (`float`): passes over its micro-batches in addition to a plain step.
            moved (`bool`, defaults to `True`): whether the weights moved by `sam_rho`.
            noise (`bool`, defaults to `False`): whether there was noise on the weights.
        """
        self.acted += moved
        self.noisy += noise
        self.extra_passes += extra_passes

    @property
    def passes(self) -> float:
        """Average number of passes per optimizer step; 1 for plain training."""
        return 1 + self.extra_passes / max(1, self.steps)

    def facts(self) -> dict:
        """The cost of training, for JSON.

        Returns:
            `dict`: `own_steps` (optimizer steps of this run), `sam_steps` (those with SAM), `passes` per step.
        """
        return {"own_steps": self.steps, "sam_steps": self.acted, "passes": self.passes}

    def summary(self) -> str:
        """The counts in one sentence."""
        skipped = f", of which {self.skipped} were skipped (gradient not finite)" if self.skipped else ""
        noise = f"; there was noise on the weights in {self.noisy}" if self.noisy else ""
        return f"SAM acted in {self.acted} of {self.steps} steps{skipped}{noise}."

    def state(self) -> dict:
        """The entries that `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self._COUNTS}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        # A run that starts from the checkpoint of another run does not continue its counts.
        if stored is not None and state.global_step > getattr(args, "first_step", 0):
            for count, value in stored["attributes"].items():
                setattr(self, count, value)
        # `Trainer` saves only callbacks that are listed here.
        state.stateful_callbacks[name] = self.state()
        self._warn(args, state)

    def _warn(self, args, state):
        if unused := args.unused_sam_fields():
            off = "sam_rho and sam_loss_rise are 0" if args.uses_sam else "sam_rho, sam_loss_rise and sam_noise are 0"
            logger.warning(
                f"{'SAM only adds noise' if args.uses_sam else 'SAM is off'}: {off}, so {', '.join(unused)} "
                f"{'has' if len(unused) == 1 else 'have'} no effect. Set sam_rho, e.g. sam_rho=0.05."
            )
        if args.uses_sam:
            window = SAMWindow.resolve(args, state.max_steps)
            if problem := window.describe_problem(args, state.max_steps):
                logger.warning(problem)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps = state.global_step - getattr(args, "first_step", 0)
        if args.uses_sam and state.is_world_process_zero:
            print(self.summary())
