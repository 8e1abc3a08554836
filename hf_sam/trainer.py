"""`SAMTrainer`, and the mixin that gives the two-pass step to any `Trainer`."""

import contextlib
import os

from accelerate.logging import get_logger
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from .arguments import SAMArguments
from .backends import check_supported
from .model_card import describe_in_model_card
from .parameters import keep_adapters_exact, select_names, trainable_parameters
from .replay import recorded_once
from .schedule import SAMWindow, annealing_kwargs, ascent_count
from .step import SAMStep

logger = get_logger(__name__)

# How TRL's trainers that generate their data show it; the last ones generate in another process.
_ON_POLICY_METHODS = {"_prepare_inputs", "_generate", "generate_on_policy_outputs"}
_ON_POLICY_TRAINERS = {"AsyncGRPOTrainer", "AsyncDistillationTrainer"}

# Far from 1, the stored weights did not take the perturbation that was asked for.
_KEPT_RANGE = (0.5, 1.5)


def check_in_front(cls: type, mixin: type, name: str) -> None:
    """Raises TypeError if a trainer class lists a mixin behind a trainer, which would never call it."""
    order = cls.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} lists {name} behind a Trainer, which would never call it. Put it in front: "
            f"class {cls.__name__}({name}, ...)."
        )


class SAMMixin:
    """Sharpness-aware training for any [`~transformers.Trainer`] subclass: `class MyTrainer(SAMMixin, Base)`.

    Each optimizer step inside the window that the arguments set takes two passes over its micro-batches: the first
    gives the ascent gradient g, the second the gradient at w + e, with which the host then clips and steps from w.
    Everywhere else, and with `sam_rho=0`, the step is the host's own.

    The arguments must carry the fields of [`SAMArguments`]. While SAM acts, the `loss` that the host logs stays the
    one at the unperturbed weights, and the metrics of [`~hf_sam.metrics.SAMMetrics`] join the logs.

    Class attributes:
        sam_recorded (`tuple[str, ...]`): attributes of the trainer that its `compute_loss` appends numbers to or counts
            up. The second pass leaves no trace in them. Holds those of TRL's trainers; extend it with your own:
            `sam_recorded = (*SAMMixin.sam_recorded, "my_counter")`.

    Raises:
        ValueError: at construction, if the arguments have no SAM fields or ask for something that cannot be done
            right; the message names the remedy.
    """

    sam_recorded: tuple[str, ...] = ("_metrics", "_stored_metrics", "_total_train_tokens")

    def __init__(self, *args, **kwargs):
        # What can be told now is told before the host prepares its models and datasets, which may take hours.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        sam = [value for value in given if isinstance(value, SAMArguments)]
        if given and not sam:
            self._check_arguments(given[0])
        if any(value.sam_rho > 0 for value in sam):
            self._check_on_policy()
        super().__init__(*args, **kwargs)
        self._check_arguments(self.args)
        if self.args.sam_rho > 0:
            keep_adapters_exact(self.model)
        self._sam: SAMStep | None = None
        self._sam_reached = False
        self._sam_warned: set[str] = set()
        self._sam_scheduler_given = self.lr_scheduler is not None
        self._check_sam()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_in_front(cls, SAMMixin, "SAMMixin")

    # The step.

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._sam_reached = True
        if not self._sam_acts():
            return super().training_step(model, inputs, num_items_in_batch)
        host_step = super().training_step
        micro_batches = self._micro_batches()

        def forward_backward(batch):
            # A micro-batch that an unfinished step left over is normalized by the length of its own step.
            current, self.current_gradient_accumulation_steps = self._micro_batches(), micro_batches
            try:
                return host_step(model, batch, num_items_in_batch)
            finally:
                self.current_gradient_accumulation_steps = current

        try:
            sam = self._sam_for(model)
            sam.rho, sam.step = self.args.sam_rho, self.state.global_step
            return sam(forward_backward, inputs)
        except BaseException:
            # The host may start over with the model wrapped anew (auto_find_batch_size).
            self._sam = None
            raise

    def train(self, *args, **kwargs):
        self._sam = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._sam = None

    def sam_perturbed_context(self, replayed: bool) -> contextlib.AbstractContextManager:
        """Around each micro-batch that is computed at the perturbed weights.

        Keeps what `compute_loss` writes into the attributes of `sam_recorded` as plain training would leave it.
        Override it for records that are kept in another way; buffers of the model need no care.

        Args:
            replayed (`bool`): whether the same micro-batch was computed, and recorded, at the unperturbed weights.
        """
        return recorded_once(self, self.sam_recorded, replayed)

    def _sam_acts(self) -> bool:
        # Without an optimizer nothing is being trained: whoever calls the step wants loss and gradient at w.
        if self.args.sam_rho <= 0 or self.optimizer is None:
            return False
        return self.state.global_step in SAMWindow.resolve(self.args, self.state.max_steps)

    def _micro_batches(self) -> int:
        # The last step of an epoch may have fewer than the arguments say.
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _sam_for(self, model) -> SAMStep:
        if self._sam is None or self._sam.backend.model is not model:
            self._sam = SAMStep(
                self.accelerator,
                model,
                self.args.sam_rho,
                adaptive=self.args.sam_adaptive,
                ascent_micro_batches=self.args.sam_ascent_micro_batches,
                ascent_sync=self.args.sam_ascent_sync,
                target_modules=self.args.sam_target_modules,
                exclude_modules=self.args.sam_exclude_modules,
                seed=self.args.seed,
                perturbed_context=self.sam_perturbed_context,
            )
            if self._sam.backend.has_coarse_weights():
                self._warn_once(
                    "coarse weights",
                    "SAM perturbs 16-bit weights that have no fp32 copy. Stochastic rounding keeps the perturbation "
                    "right on average, but adds rounding noise that can be larger than the perturbation itself. For "
                    "an exact step load the model in float32 and train with bf16=True or fp16=True.",
                )
        return self._sam

    # What surrounds it.

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Hyperparameter search sets arguments after they were checked; this is the first hook that runs after it.
        self.args.check_sam()
        self._check_sam()
        if self.args.anneal_steps is None:
            return super().create_scheduler(num_training_steps, optimizer)
        given = self.args.lr_scheduler_kwargs
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.args.lr_scheduler_kwargs = {
            **(given or {}),
            **annealing_kwargs(self.args, num_training_steps, warmup),
        }
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            # The saved arguments stay as the user gave them.
            self.args.lr_scheduler_kwargs = given

    def floating_point_ops(self, inputs):
        operations = super().floating_point_ops(inputs)
        if not self._sam_acts():
            return operations
        micro_batches = self._micro_batches()
        return operations * (1 + ascent_count(self.args.sam_ascent_micro_batches, micro_batches) / micro_batches)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sam_logs = self._sam.pop_metrics() if self._sam is not None else {}
            low, high = _KEPT_RANGE
            kept = sam_logs.get("sam/perturbation_kept", 1.0)
            if not low <= kept <= high:
                self._warn_once(
                    "rounded away",
                    f"Of the SAM perturbation, the stored weights kept {kept:.2f} instead of 1: it is lost in their "
                    "rounding. Load the model in float32 and train with bf16=True or fp16=True, or raise sam_rho.",
                )
            if self.args.sam_rho > 0 and not self._sam_reached:
                self._warn_once(
                    "never reached",
                    f"SAM did not act: the `training_step` of {type(self).__name__} never calls that of SAMMixin. Call "
                    "super().training_step() in it, or put SAMMixin in front of the class that overrides it.",
                )
            logs.update(sam_logs)
        return super().log(logs, start_time)

    def _warn_once(self, what: str, message: str):
        if what not in self._sam_warned:
            self._sam_warned.add(what)
            logger.warning(message)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            describe_in_model_card(os.path.join(self.args.output_dir, "README.md"), self.args, self.state.log_history)

    # What is refused.

    def _check_sam(self):
        if self.args.anneal_steps is not None:
            self._check_annealing()
        if self.args.sam_rho <= 0:
            return
        check_supported(self.accelerator, self.args.sam_ascent_sync)
        optim = OptimizerNames(self.args.optim)
        if optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO) or "layerwise" in optim.value:
            raise ValueError(
                f"SAM does not support optim={optim.value!r}, which updates the weights inside the backward pass, so "
                "that there is no gradient to climb along. Use another optimizer, e.g. optim='adamw_torch'."
            )
        self._check_on_policy()
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "SAM does not support a model that was sharded while it was loaded (`distributed_config`). Load it "
                "normally and let the Trainer shard it with FSDP2 or DeepSpeed."
            )
        # A wrong pattern should be told now, not after the data was prepared and the model was sharded.
        select_names(trainable_parameters(self.model), self.args.sam_target_modules, self.args.sam_exclude_modules)

    def _check_arguments(self, args: TrainingArguments):
        if not isinstance(args, SAMArguments):
            kind = type(args).__name__
            raise ValueError(
                f"{type(self).__name__} needs arguments with SAM fields, but got {kind}. Pass "
                "hf_sam.SAMTrainingArguments, hf_sam.SAMSFTConfig, or a config of your own with the SAM fields: "
                f"MyConfig = hf_sam.with_sam({kind})."
            )

    def _check_on_policy(self):
        hosts = [base for base in type(self).__mro__ if base.__module__.startswith("trl.")]
        if any(_ON_POLICY_METHODS & vars(base).keys() or base.__name__ in _ON_POLICY_TRAINERS for base in hosts):
            raise ValueError(
                f"SAM does not support {type(self).__name__}, which generates its training data inside of the step: "
                "the second pass would see other data than the first, and its importance weights compare with "
                "log-probabilities at the unperturbed weights. Use a trainer that learns from a fixed dataset."
            )

    def _check_annealing(self):
        if self._sam_scheduler_given:
            raise ValueError(
                "anneal_steps sets the learning-rate schedule, but a scheduler was passed in `optimizers`. Pass "
                "`optimizers=(optimizer, None)`, or drop anneal_steps."
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and "scheduler" in plugin.deepspeed_config:
            raise ValueError(
                "anneal_steps sets the learning-rate schedule, but the DeepSpeed config has a `scheduler` of its own. "
                "Remove it from the config, or drop anneal_steps."
            )


class SAMTrainer(SAMMixin, Trainer):
    """[`~transformers.Trainer`] with sharpness-aware steps; takes [`SAMTrainingArguments`]. See [`SAMMixin`]."""
