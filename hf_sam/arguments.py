"""The SAM flags: a mixin dataclass for any `TrainingArguments` subclass."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from accelerate.logging import get_logger
from transformers import SchedulerType, TrainingArguments

from .step.counts import check_count
from .step.variants import DEFAULT, VARIANTS, check_variant

logger = get_logger(__name__)


@dataclass
class SAMArguments:
    r"""Arguments of sharpness-aware training and of shortened annealing.

    Use it as the first base class of a config dataclass: `class MyConfig(SAMArguments, SFTConfig)`. A number of steps
    below 1 is a fraction of the steps of the run, as in `save_steps` and `warmup_steps`. A resumed run counts as one
    run; a run that starts from the checkpoint of another run (`anneal_from`) counts only its own steps.

    Parameters for the perturbation:
        sam_rho (`float`, *optional*, defaults to `0.0`):
            Radius \\(\rho\\) of the perturbation \\(e = \rho g / \|g\|\\) (arXiv 2010.01412, eq. 2). `0` is plain
            training. The paper of sharpness-aware pretraining (arXiv 2605.02105) uses 0.05.
        sam_loss_rise (`float`, *optional*, defaults to `0.0`):
            If not 0, the radius of each step is `sam_loss_rise` \\(/ \|g\|\\), so that the loss rises by this number
            of nats to first order (arXiv 2605.10183), but at most `sam_rho`, if that is set, too.
        sam_variant (`str`, *optional*, defaults to `"sam"`):
            Name of the variant, which defines the perturbation. `"sam"`: as above. `"asam"`, adaptive SAM:
            \\(e = \rho |w|^2 g / \| |w| g\|\\) elementwise (arXiv 2102.11600, eq. 8); its \\(\rho\\) is on another
            scale, 0.5 to 2 in that paper. `"momentum"`, MSAM: \\(e = -\rho m / \|m\|\\), where m is the first moment of
            the optimizer (arXiv 2401.12033); it has no ascent pass, so a step costs one pass, and the logged loss is
            that at w + e. You can register other variants ([`hf_sam.step.variants`](~hf_sam.step.variants)).
        sam_noise (`float`, *optional*, defaults to `0.0`):
            Adds \\(s w u\\) to the perturbation, elementwise, with \\(s\\) this number and \\(u\\) uniform of mean 0
            and variance 1, in each step of the window, also in those that `sam_interval` leaves out. Needs no ascent
            pass, so it also works alone, with `sam_rho=0` and the passes of plain training. Prepares for quantization
            (arXiv 2412.06858).
        sam_ascent_micro_batches (`float`, *optional*):
            Number of micro-batches in the ascent pass; below 1, the fraction of the step's micro-batches. All of them
            when omitted. With k of N micro-batches, a step costs 1 + k/N plain steps.
        sam_ascent_sync (`str`, *optional*, defaults to `"global"`):
            `"global"`: all ranks use the ascent gradient of the global batch. `"local"`: each DDP replica uses the
            ascent gradient of its own micro-batches (m-sharpness), without communication, as in arXiv 2605.02105.
        sam_target_modules (`list[str]`, *optional*):
            Regular expressions (`re.search`) over parameter names: the parameters to perturb. All trainable ones when
            omitted.
        sam_exclude_modules (`list[str]`, *optional*):
            Regular expressions over parameter names: the parameters not to perturb.

    Parameters for the steps with SAM:
        sam_start_steps (`float`, *optional*, defaults to `0`):
            First optimizer step with SAM, counted from 0.
        sam_end_steps (`float`, *optional*):
            Optimizer step at which SAM ends (exclusive). The end of the run when omitted.
        sam_interval (`int`, *optional*, defaults to `1`):
            SAM acts in every `sam_interval`-th step of its window, starting with the first.
        sam_phase (`str`, *optional*, defaults to `"all"`):
            `"anneal"` restricts SAM to the annealing phase, which `anneal_steps` sets.

    Parameters for shortened annealing:
        anneal_steps (`float`, *optional*):
            Length of the final decay of the learning rate. Before it, the learning rate is constant (after
            `warmup_steps`). Selects the `warmup_stable_decay` schedule of `Trainer`.
        anneal_type (`str`, *optional*, defaults to `"linear"`):
            Shape of the decay: `"linear"`, `"cosine"` or `"1-sqrt"`.
        anneal_min_lr_ratio (`float`, *optional*, defaults to `0.0`):
            Learning rate at the end of the decay, as a fraction of `learning_rate`.

    Raises:
        ValueError: if a value is out of range, or contradicts another one.
    """

    sam_rho: float = field(
        default=0.0,
        metadata={"help": "[SAM] Radius rho of the SAM perturbation e = rho * g / ||g||; 0 trains without SAM."},
    )
    sam_loss_rise: float = field(
        default=0.0,
        metadata={
            "help": "[SAM] First-order rise of the loss by the perturbation, in nats: the radius of each step is "
            "sam_loss_rise / ||g||, at most sam_rho if that is set. 0: the radius is sam_rho."
        },
    )
    sam_variant: str = field(
        default=DEFAULT,
        metadata={
            "help": "[SAM] Name of the variant, which defines the perturbation. "
            + "; ".join(f"{name}: {variant.equation}" for name, variant in VARIANTS.items())
            + "."
        },
    )
    sam_noise: float = field(
        default=0.0,
        metadata={
            "help": "[SAM] Standard deviation of random noise on the weights during each step of the window, relative "
            "to each weight; also in the steps that sam_interval leaves out. 0: no noise."
        },
    )
    sam_start_steps: float = field(
        default=0.0, metadata={"help": "[SAM] First optimizer step with SAM; below 1, a fraction of the run."}
    )
    sam_end_steps: float | None = field(
        default=None,
        metadata={"help": "[SAM] Optimizer step at which SAM ends; below 1, a fraction of the run. Default: never."},
    )
    sam_interval: int = field(default=1, metadata={"help": "[SAM] SAM acts in every n-th step of its window."})
    sam_phase: Literal["all", "anneal"] = field(
        default="all",
        metadata={"help": "[SAM] Phase in which SAM acts: the whole run, or the annealing of `anneal_steps`."},
    )
    sam_ascent_micro_batches: float | None = field(
        default=None,
        metadata={
            "help": "[SAM] Number of micro-batches in the ascent pass; below 1, the fraction of the step's "
            "micro-batches. Default: all."
        },
    )
    sam_ascent_sync: Literal["global", "local"] = field(
        default="global",
        metadata={
            "help": "[SAM] 'global': ascent gradient of the global batch. 'local': each DDP replica uses its own "
            "ascent gradient (m-sharpness)."
        },
    )
    sam_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "[SAM] Regular expressions of the parameters to perturb. Default: all trainable ones."},
    )
    sam_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "[SAM] Regular expressions of the parameters not to perturb."}
    )
    anneal_steps: float | None = field(
        default=None,
        metadata={
            "help": "[annealing] Length of the final decay of the learning rate after a constant phase; below 1, a "
            "fraction of the run. Uses the warmup_stable_decay schedule."
        },
    )
    anneal_type: Literal["linear", "cosine", "1-sqrt"] = field(
        default="linear", metadata={"help": "[annealing] Shape of the final decay set by `anneal_steps`."}
    )
    anneal_min_lr_ratio: float = field(
        default=0.0,
        metadata={"help": "[annealing] Learning rate at the end of the final decay, as a fraction of the peak."},
    )

    def __post_init__(self):
        self._check_values()
        host = getattr(super(), "__post_init__", None)
        if host is not None:
            host()
        self._check_annealing()

    def check_sam(self) -> None:
        """Check the fields of this class again, after some of them were changed.

        Raises:
            ValueError: if a value is out of range, or contradicts another one.
        """
        self._check_values()
        self._check_annealing()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        # `Trainer` calls this before training. A trainer with SAM has called `claim_for_sam` by then.
        unclaimed = not getattr(self, "_claimed_by_sam", False)
        if unclaimed and (self.uses_sam or self.anneal_steps is not None):
            logger.warning(
                f"{type(self).__name__} sets sam_rho={self.sam_rho:g}, sam_loss_rise={self.sam_loss_rise:g}, "
                f"sam_noise={self.sam_noise:g} and anneal_steps={self.anneal_steps}, but the trainer that uses it does "
                "not support SAM, so they have no effect. Use hf_sam.SAMTrainer, hf_sam.SAMSFTTrainer, or "
                "hf_sam.with_sam(YourTrainer)."
            )
        return super().get_warmup_steps(num_training_steps)

    def claim_for_sam(self) -> None:
        """Record that a trainer with SAM uses these arguments."""
        self._claimed_by_sam = True

    @property
    def uses_sam(self) -> bool:
        """Whether steps perturb the weights."""
        return self.sam_rho > 0 or self.sam_loss_rise > 0 or self.sam_noise > 0

    @property
    def largest_radius(self) -> float:
        """`sam_rho`, or infinity if only `sam_loss_rise` limits the radius."""
        return self.sam_rho if self.sam_rho > 0 or not self.sam_loss_rise else math.inf

    @property
    def ascends(self) -> bool:
        """Whether steps with SAM have an ascent pass."""
        return self.largest_radius > 0 and VARIANTS[self.sam_variant].passes == 2

    def layout_dependence(self) -> dict:
        """Settings of the hardware layout that change the result of a run with SAM, by name.

        The ascent gradient of each replica, or of some micro-batches, depends on the number of processes and the size
        of micro-batches. The ascent gradient of the global batch does not, and the result is empty.
        """
        if self.ascends and (self.sam_ascent_sync == "local" or self.sam_ascent_micro_batches is not None):
            return {"world_size": self.world_size, "per_device_train_batch_size": self.per_device_train_batch_size}
        return {}

    def unused_sam_fields(self) -> list[str]:
        """Names of the SAM fields that are set without effect, because SAM is off, or there is only noise."""
        if self.largest_radius > 0:
            return []
        known = _DIRECTION_FIELDS if self.uses_sam else SAMArguments.__dataclass_fields__
        return [
            name for name in known if name.startswith("sam_") and getattr(self, name) != _default(SAMArguments, name)
        ]

    def _check_values(self):
        for name in _FLOAT_FIELDS:
            setattr(self, name, _as_float(name, getattr(self, name)))
        check_variant(self.sam_variant, "sam_variant")
        self._check_ascent_fields()
        if not (math.isfinite(self.sam_rho) and self.sam_rho >= 0):
            raise ValueError(f"sam_rho={self.sam_rho} must be a finite number, 0 (no SAM) or larger.")
        if not (math.isfinite(self.sam_noise) and self.sam_noise >= 0):
            raise ValueError(f"sam_noise={self.sam_noise} must be a finite number, 0 (no noise) or larger.")
        if not (math.isfinite(self.sam_loss_rise) and self.sam_loss_rise >= 0):
            raise ValueError(
                f"sam_loss_rise={self.sam_loss_rise} must be a finite number of nats, 0 (radius sam_rho) or larger."
            )
        for name in ("sam_start_steps", "sam_end_steps", "anneal_steps", "sam_ascent_micro_batches"):
            check_count(name, getattr(self, name), zero_allowed=name == "sam_start_steps")
        if isinstance(self.sam_interval, bool) or not isinstance(self.sam_interval, int) or self.sam_interval < 1:
            raise ValueError(f"sam_interval={self.sam_interval} must be a whole number of steps, 1 or larger.")
        end, start = self.sam_end_steps, self.sam_start_steps
        if end is not None and (end < 1) == (start < 1) and end <= start:
            raise ValueError(f"sam_end_steps={end:g} must be larger than sam_start_steps={start:g}.")
        for name in ("sam_phase", "sam_ascent_sync", "anneal_type"):
            choices = _choices(name)
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}.")
        for name in ("sam_target_modules", "sam_exclude_modules"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])

    def _check_ascent_fields(self):
        if VARIANTS[self.sam_variant].passes == 2:
            return
        for name in ("sam_loss_rise", "sam_ascent_micro_batches", "sam_ascent_sync"):
            if getattr(self, name) != _default(SAMArguments, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning with sam_variant={self.sam_variant!r}, which has "
                    f"no ascent pass. Remove {name}, or choose another variant."
                )

    def _check_annealing(self):
        if not 0 <= self.anneal_min_lr_ratio < 1:
            raise ValueError(f"anneal_min_lr_ratio={self.anneal_min_lr_ratio} must be at least 0 and below 1.")
        if self.anneal_steps is None:
            if self.sam_phase == "anneal":
                raise ValueError(
                    "sam_phase='anneal' needs an annealing phase: set anneal_steps, e.g. anneal_steps=0.1."
                )
            return
        chosen = getattr(self, "lr_scheduler_type", None)
        if chosen is None:
            return
        # A value that equals the default cannot be distinguished from an omitted one.
        given = SchedulerType(chosen) != SchedulerType(_default(type(self), "lr_scheduler_type"))
        if given and chosen != SchedulerType.WARMUP_STABLE_DECAY:
            raise ValueError(
                f"anneal_steps={self.anneal_steps:g} sets a constant learning rate with a final decay, but "
                f"lr_scheduler_type={SchedulerType(chosen).value!r} selects another schedule. Drop one of the two."
            )
        reserved = {"num_decay_steps", "num_stable_steps", "decay_type", "min_lr_ratio"} & set(
            self.lr_scheduler_kwargs or {}
        )
        if reserved:
            raise ValueError(
                f"anneal_steps sets {', '.join(sorted(reserved))} itself. Remove them from lr_scheduler_kwargs, or "
                "drop anneal_steps and configure lr_scheduler_type='warmup_stable_decay' by hand."
            )
        self.lr_scheduler_type = SchedulerType.WARMUP_STABLE_DECAY


@dataclass(repr=False)  # the repr of TrainingArguments hides tokens
class SAMTrainingArguments(SAMArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the fields of [`SAMArguments`]."""


# Fields without effect where there is only noise.
_DIRECTION_FIELDS = ("sam_variant", "sam_interval", "sam_ascent_micro_batches", "sam_ascent_sync")

_FLOAT_FIELDS = (
    "sam_rho",
    "sam_loss_rise",
    "sam_noise",
    "sam_start_steps",
    "sam_end_steps",
    "sam_ascent_micro_batches",
    "anneal_steps",
    "anneal_min_lr_ratio",
)


def _as_float(name: str, value):
    """Convert `value` to float. YAML reads 5e-2 as a string, which `TrainingArguments` also accepts for its fields."""
    if value is None and name in ("sam_end_steps", "sam_ascent_micro_batches", "anneal_steps"):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        # Always a float, because hyperparameter search casts each trial value to the type of the field.
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number.") from None


def _choices(name: str) -> tuple:
    annotation = next(f.type for f in fields(SAMArguments) if f.name == name)
    return annotation.__args__


def _default(config_class: type, name: str):
    config_field = next(f for f in fields(config_class) if f.name == name)
    return config_field.default if config_field.default is not MISSING else config_field.default_factory()
