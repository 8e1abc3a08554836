"""`SAMTrainer`, and the mixin that gives the two-pass step to any `Trainer`."""

import contextlib

from accelerate.logging import get_logger
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .arguments import SAMArguments
from .backends import Backend, check_supported, select_backend
from .metrics import SAMMetrics
from .parameters import select_names, trainable_parameters
from .schedule import SAMWindow, annealing_kwargs, ascent_count
from .step import TwoPassStep

logger = get_logger(__name__)

# Far from 1, the stored weights did not take the perturbation that was asked for.
_KEPT_RANGE = (0.5, 1.5)


class SAMMixin:
    """Sharpness-aware training for any [`~transformers.Trainer`] subclass: `class MyTrainer(SAMMixin, Base)`.

    Each optimizer step inside the window that the arguments set takes two passes over its micro-batches: the first
    gives the ascent gradient g, the second the gradient at w + e, with which the host then clips and steps from w.
    Everywhere else, and with `sam_rho=0`, the step is the host's own.

    The arguments must carry the fields of [`SAMArguments`]. While SAM acts, the `loss` that the host logs stays the
    one at the unperturbed weights, and the metrics of [`~hf_sam.metrics.SAMMetrics`] join the logs.

    Raises:
        ValueError: at construction, if the arguments have no SAM fields or ask for something that cannot be done
            right; the message names the remedy.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SAMArguments):
            raise ValueError(
                f"{type(self).__name__} needs arguments with SAM fields, but got {type(self.args).__name__}. Pass "
                "hf_sam.SAMTrainingArguments, or a config of your own with hf_sam.SAMArguments mixed in: "
                f"class MyConfig(SAMArguments, {type(self.args).__name__})."
            )
        self._sam_metrics = SAMMetrics(self.accelerator)
        self._sam_step = TwoPassStep(self.accelerator, self._sam_metrics, self.sam_replay_context)
        self._sam_backend: Backend | None = None
        self._sam_warned = False
        self._check_sam()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(SAMMixin):
            raise TypeError(
                f"{cls.__name__} lists SAMMixin behind a Trainer, which would never call it. Put it in front: "
                f"class {cls.__name__}(SAMMixin, ...)."
            )

    # The step.

    def training_step(self, model, inputs, num_items_in_batch=None):
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
            return self._sam_step.add(
                forward_backward,
                inputs,
                self._backend_for(model),
                rho=self.args.sam_rho,
                step=self.state.global_step,
                ascent_count=lambda count: ascent_count(self.args, count),
            )
        except BaseException:
            # The host may start over with the model wrapped anew (auto_find_batch_size).
            self._forget_steps()
            raise

    def train(self, *args, **kwargs):
        self._forget_steps()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._forget_steps()

    def _forget_steps(self):
        self._sam_metrics.reset()
        self._sam_step.reset()
        self._sam_backend = None

    def sam_replay_context(self) -> contextlib.AbstractContextManager:
        """Around each micro-batch that is computed a second time, at the perturbed weights.

        The buffers of the model are kept from advancing twice already. Override it if your `compute_loss` counts or
        records something of its own.
        """
        return contextlib.nullcontext()

    def _sam_acts(self) -> bool:
        # Without an optimizer nothing is being trained: whoever calls the step wants loss and gradient at w.
        if self.args.sam_rho <= 0 or self.optimizer is None:
            return False
        return self.state.global_step in SAMWindow.resolve(self.args, self.state.max_steps)

    def _micro_batches(self) -> int:
        # The last step of an epoch may have fewer than the arguments say.
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _backend_for(self, model) -> Backend:
        if self._sam_backend is None or self._sam_backend.model is not model:
            self._sam_backend = select_backend(
                self.accelerator,
                model,
                adaptive=self.args.sam_adaptive,
                ascent_sync=self.args.sam_ascent_sync,
                target=self.args.sam_target_modules,
                exclude=self.args.sam_exclude_modules,
                seed=self.args.seed,
            )
            if self._sam_backend.has_coarse_weights():
                logger.warning(
                    "SAM perturbs 16-bit weights that have no fp32 copy. Stochastic rounding keeps the perturbation "
                    "right on average, but adds rounding noise that can be larger than the perturbation itself. For "
                    "an exact step load the model in float32 and train with bf16=True or fp16=True."
                )
        return self._sam_backend

    # What surrounds it.

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Hyperparameter search sets arguments after they were checked; this is the first hook that runs after it.
        self.args.check_sam()
        self._check_sam(own_scheduler=False)
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
        return operations * (1 + ascent_count(self.args, micro_batches) / micro_batches)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sam_logs = self._sam_metrics.pop()
            self._warn_if_rounded_away(sam_logs.get("sam/perturbation_kept", 1.0))
            logs.update(sam_logs)
        return super().log(logs, start_time)

    def _warn_if_rounded_away(self, kept: float):
        low, high = _KEPT_RANGE
        if not low <= kept <= high and not self._sam_warned:
            self._sam_warned = True
            logger.warning(
                f"Of the SAM perturbation, the stored weights kept {kept:.2f} instead of 1: it is lost in their "
                "rounding. Load the model in float32 and train with bf16=True or fp16=True, or raise sam_rho."
            )

    # What is refused.

    def _check_sam(self, own_scheduler: bool = True):
        if self.args.anneal_steps is not None:
            self._check_annealing(own_scheduler)
        if self.args.sam_rho <= 0:
            return
        check_supported(self.accelerator, self.args.sam_ascent_sync)
        optim = OptimizerNames(self.args.optim)
        if optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO) or "layerwise" in optim.value:
            raise ValueError(
                f"SAM does not support optim={optim.value!r}, which updates the weights inside the backward pass, so "
                "that there is no gradient to climb along. Use another optimizer, e.g. optim='adamw_torch'."
            )
        on_policy = {"_prepare_inputs", "_generate", "generate_on_policy_outputs"}
        if any(base.__module__.startswith("trl.") and on_policy & vars(base).keys() for base in type(self).__mro__):
            raise ValueError(
                f"SAM does not support {type(self).__name__}, which generates its training data inside of the step: "
                "the second pass would see other data than the first. Use a trainer that learns from a fixed dataset."
            )
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "SAM does not support a model that was sharded while it was loaded (`distributed_config`). Load it "
                "normally and let the Trainer shard it with FSDP2 or DeepSpeed."
            )
        # A wrong pattern should be told now, not after the data was prepared and the model was sharded.
        select_names(trainable_parameters(self.model), self.args.sam_target_modules, self.args.sam_exclude_modules)

    def _check_annealing(self, own_scheduler: bool):
        if own_scheduler and self.lr_scheduler is not None:
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
