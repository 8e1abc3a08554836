"""`SAMTrainer`, and the mixin that adds the SAM step to any `Trainer`."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator

from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from .arguments import SAMArguments
from .configs import add_sam_fields
from .history import SAMHistory
from .model_card import describe_in_model_card
from .records import TrainerLoopState, discard_appended, reachable_from_trainer
from .schedule import SAMWindow, annealing_kwargs, extra_passes
from .step.backends import check_supported, has_own_scheduler
from .step.moments import MomentsCheck
from .step.parameters import check_perturbable, keep_adapters_in_fp32, select_names, trainable_parameters
from .step.replay import disable_method, parameters_reached
from .step.replay.reach import code_names
from .step.sam_step import SAMStep
from .step.variants import VARIANTS

logger = get_logger(__name__)

# Methods that identify TRL trainers that generate their training data; the trainers below do so in another process.
_ON_POLICY_METHODS = {"_prepare_inputs", "_generate", "generate_on_policy_outputs"}
_ON_POLICY_TRAINERS = {"AsyncGRPOTrainer", "AsyncDistillationTrainer"}


def check_in_front(cls: type, mixin: type, name: str) -> None:
    """Raises TypeError if a class lists `mixin` after a `Trainer`, which would never call the mixin."""
    order = cls.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} lists {name} after a Trainer, which would never call it. List it first: "
            f"class {cls.__name__}({name}, ...)."
        )


def once_per_step(training_step: Callable) -> Callable:
    """Mark a `training_step` that comes before [`SAMMixin`] in the MRO as one that runs once around both passes."""
    training_step.sam_once_per_step = True
    return training_step


def _run_passes_around(training_step: Callable) -> Callable:
    """Wrap a `training_step` such that SAM calls it for each micro-batch of both passes.

    So a subclass of a SAM trainer works like a trainer that SAM is mixed into: after `super().training_step()`, the
    gradient of the micro-batch is there.
    """
    if getattr(training_step, "sam_runs_passes", False) or getattr(training_step, "sam_once_per_step", False):
        return training_step

    @functools.wraps(training_step)
    def wrapper(self, model, inputs, *args, **kwargs):
        return self._sam_training_step(functools.partial(training_step, self), model, inputs, *args, **kwargs)

    wrapper.sam_runs_passes = True
    return wrapper


class SAMMixin:
    """Sharpness-aware training for any [`~transformers.Trainer`] subclass: `class MyTrainer(SAMMixin, Base)`.

    Each optimizer step in the SAM window runs two passes over its micro-batches: the ascent pass computes the ascent
    gradient g, the descent pass the gradient at w + e. `Trainer` clips this gradient and steps from w. With
    `sam_variant="momentum"` or only `sam_noise`, there is no ascent pass. All other steps, and all steps with
    `sam_rho=0`, are those of `Trainer`. If you override `training_step`, in a base class or a subclass, it is called
    for each micro-batch of both passes, and can change the gradients of both.

    The arguments must have the fields of [`SAMArguments`]. In steps with an ascent pass, the logged `loss` is the loss
    at the unperturbed weights, and the metrics of [`~hf_sam.step.metrics.SAMMetrics`] are logged, too.

    Class attributes:
        sam_recorded (`tuple[str, ...]`): attributes of the trainer that `compute_loss` writes to: numbers, containers,
            arrays, tensors, modules, objects with attributes. They are restored after the second pass. Contains those
            of TRL and sentence-transformers; add your own:
            `sam_recorded = (*SAMMixin.sam_recorded, "my_counter")`. Random generators and modules in attributes of the
            trainer are restored without being listed.

    Raises:
        ValueError: at construction, if the arguments lack the SAM fields, or SAM does not support the set-up; the
            message names the remedy.
    """

    sam_recorded: tuple[str, ...] = ("_metrics", "_stored_metrics", "_total_train_tokens", "accum_loss_components")

    def __init__(self, *args, **kwargs):
        # Fail early: `Trainer` may prepare models and datasets for hours.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        sam = [value for value in given if isinstance(value, SAMArguments)]
        if given and not sam:
            self._check_arguments(given[0])
        if any(value.uses_sam for value in sam):
            self._check_on_policy()
        super().__init__(*args, **kwargs)
        if not given and not isinstance(self.args, SAMArguments) and self._takes_arguments():
            # Without arguments, `Trainer` creates default ones, which lack the SAM fields.
            add_sam_fields(self.args)
            logger.warning(
                f"{type(self).__name__} got no arguments, so SAM is off. To turn it on, pass "
                f"hf_sam.with_sam({type(self.args).__mro__[2].__name__})(output_dir=..., sam_rho=0.05)."
            )
        self._check_arguments(self.args)
        self.args.claim_for_sam()
        if self.args.uses_sam:
            keep_adapters_in_fp32(self.model)
        self.add_callback(SAMHistory())
        self._sam: SAMStep | None = None
        self._sam_inside = False
        self._sam_reached = False
        self._sam_moments = MomentsCheck()  # replaced before training
        self._sam_warned: set[str] = set()
        self._sam_scheduler_given = self.lr_scheduler is not None
        self._check_sam()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_in_front(cls, SAMMixin, "SAMMixin")
        in_front = cls.__mro__[: cls.__mro__.index(SAMMixin)]
        first = next((vars(base)["training_step"] for base in in_front if "training_step" in vars(base)), None)
        if first is not None and _run_passes_around(first) is not first:
            cls.training_step = _run_passes_around(first)

    # The step.

    def training_step(self, model, inputs, *args, **kwargs):
        return self._sam_training_step(super().training_step, model, inputs, *args, **kwargs)

    def _sam_training_step(self, host_step: Callable, model, inputs, *args, **kwargs):
        self._sam_reached = True
        stepped = self.optimizer is not None and self.state.global_step > 0
        if stepped and not self.accelerator.optimizer_step_was_skipped:
            self._sam_moments.after_a_step(self.optimizer)
        if self._sam_inside or not self._sam_acts():
            return host_step(model, inputs, *args, **kwargs)
        micro_batches = self._micro_batches()

        def forward_backward(batch):
            # A micro-batch from an unfinished step is normalized by the number of micro-batches of its own step.
            current, self.current_gradient_accumulation_steps = self._micro_batches(), micro_batches
            self._sam_inside = True
            try:
                return host_step(model, batch, *args, **kwargs)
            finally:
                self._sam_inside = False
                self.current_gradient_accumulation_steps = current

        try:
            sam = self._sam_for(model)
            sam.noise, sam.loss_rise = self.args.sam_noise, self.args.sam_loss_rise
            sam.rho = self._sam_radius()
            sam.step, sam.optimizers = self.state.global_step, [self.optimizer]
            acted = sam.acted
            loss = sam(forward_backward, inputs)
        except BaseException:
            # `Trainer` may retry with a newly wrapped model (auto_find_batch_size).
            self._sam = None
            raise
        if sam.acted > acted:
            self.sam_history.add(self._sam_extra_passes(micro_batches), moved=sam.rho > 0, noise=sam.noise > 0)
        return loss

    @property
    def sam_history(self) -> SAMHistory:
        """Counts of the SAM steps of the run so far."""
        # Not stored in an attribute, because `Trainer` replaces callbacks by those of a checkpoint.
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, SAMHistory))

    def train(self, *args, **kwargs):
        self._sam = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._sam = None

    @contextlib.contextmanager
    def sam_perturbed_context(self, replayed: bool) -> Iterator[None]:
        """Context around each micro-batch at the perturbed weights.

        It disables `log`, and removes values that are appended to the attributes in `sam_recorded`. Override it for
        other kinds of records. States of modules and random generators are restored in any case.

        Args:
            replayed (`bool`): whether the same micro-batch has been computed, and recorded, at the unperturbed weights.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(disable_method(self, "log"))
            if not replayed:
                stack.enter_context(discard_appended(self, self.sam_recorded))
            yield

    def _sam_acts(self) -> bool:
        # Without an optimizer nothing is trained; the caller wants loss and gradient at w.
        if not self.args.uses_sam or self.optimizer is None:
            return False
        window = SAMWindow.resolve(self.args, self.state.max_steps)
        adds_noise = self.args.sam_noise > 0 and window.spans(self.state.global_step)
        return adds_noise or self._sam_radius() > 0

    def _sam_radius(self) -> float:
        """Largest radius of the current step; 0 in the steps that `sam_interval` leaves out."""
        window = SAMWindow.resolve(self.args, self.state.max_steps)
        return self.args.largest_radius if self.state.global_step in window else 0.0

    def _sam_extra_passes(self, micro_batches: int) -> float:
        return extra_passes(self.args, micro_batches) if self._sam_radius() > 0 else 0.0

    def _micro_batches(self) -> int:
        # The last step of an epoch may have fewer micro-batches than `gradient_accumulation_steps`.
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def _sam_for(self, model) -> SAMStep:
        if self._sam is None or self._sam.backend.model is not model:
            self._sam = SAMStep(
                self.accelerator,
                model,
                self.args.largest_radius,
                noise=self.args.sam_noise,
                loss_rise=self.args.sam_loss_rise,
                optimizer=self.optimizer,
                variant=self.args.sam_variant,
                ascent_micro_batches=self.args.sam_ascent_micro_batches,
                ascent_sync=self.args.sam_ascent_sync if self.args.ascends else "global",
                target_modules=self.args.sam_target_modules,
                exclude_modules=self.args.sam_exclude_modules,
                seed=self.args.seed,
                perturbed_context=self.sam_perturbed_context,
                loop_state=functools.partial(
                    TrainerLoopState,
                    trainer=self,
                    recorded=self.sam_recorded,
                    known=frozenset(SAMMixin.sam_recorded),
                ),
            )
            self._check_substeps()
            if self._sam.backend.has_low_precision_weights():
                self._warn_once(
                    "coarse weights",
                    "SAM perturbs 16-bit weights that have no fp32 copy. With stochastic rounding, the perturbation is "
                    "correct on average, but the rounding noise can be larger than the perturbation itself. For an "
                    "exact step, load the model in float32 and train with bf16=True or fp16=True.",
                )
        return self._sam

    # What surrounds it.

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Hyperparameter search changes arguments after construction; this is the first hook that runs afterwards.
        self.args.check_sam()
        self.args.claim_for_sam()
        self._check_sam()
        self._sam_moments = MomentsCheck(
            VARIANTS[self.args.sam_variant].moments if self.args.largest_radius > 0 else ()
        )
        self._sam_moments.before_training(self.optimizer if optimizer is None else optimizer)
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
            # So that `training_args.bin` contains the arguments of the user.
            self.args.lr_scheduler_kwargs = given

    def floating_point_ops(self, inputs):
        operations = super().floating_point_ops(inputs)
        if not self._sam_acts():
            return operations
        return operations * (1 + self._sam_extra_passes(self._micro_batches()))

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sam_logs = self._sam.pop_metrics() if self._sam is not None else {}
            self.sam_history.skipped += sam_logs.get("sam/skipped", 0)
            if self.args.uses_sam and not self._sam_reached:
                self._warn_once(
                    "never reached",
                    f"SAM did not act: the `training_step` of {type(self).__name__} does not call that of SAMMixin. "
                    "Call super().training_step() in it, or list SAMMixin before the class that overrides it.",
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
            card = os.path.join(self.args.output_dir, "README.md")
            describe_in_model_card(card, self.args, self.state.log_history, self.sam_history)

    # Checks.

    def _check_sam(self):
        if self.args.anneal_steps is not None:
            self._check_annealing()
        if not self.args.uses_sam:
            return
        check_supported(self.accelerator, self.args.sam_ascent_sync if self.args.ascends else "global")
        optim = OptimizerNames(self.args.optim)
        if optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO) or "layerwise" in optim.value:
            raise ValueError(
                f"SAM does not support optim={optim.value!r}, which updates the weights inside the backward pass: "
                "there is no gradient left for the ascent step. Use another optimizer, e.g. optim='adamw_torch'."
            )
        self._check_on_policy()
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "SAM does not support models that are sharded while they are loaded (`distributed_config`). Load the "
                "model without it, and let the Trainer shard it with FSDP2 or DeepSpeed."
            )
        # Fail early for a wrong pattern, before the data is prepared and the model is sharded.
        trainable = trainable_parameters(self.model)
        check_perturbable(trainable)
        # The optimizer, which decides what trains outside of the model, does not exist yet; accept all candidates.
        inside = {id(param) for param in self.model.parameters()}
        outside = parameters_reached(reachable_from_trainer(self), inside)
        select_names(trainable.keys() | outside.keys(), self.args.sam_target_modules, self.args.sam_exclude_modules)

    def _takes_arguments(self) -> bool:
        """Whether the constructor of the base trainer has a parameter `args`."""
        order = type(self).__mro__
        for base in order[order.index(SAMMixin) + 1 :]:
            if "__init__" in vars(base):
                parameters = inspect.signature(base.__init__).parameters.values()
                named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                if named != ["self"]:  # skip constructors that only forward *args and **kwargs
                    return "args" in named
        return False

    def _check_arguments(self, args: TrainingArguments):
        if not isinstance(args, SAMArguments):
            kind = type(args).__name__
            raise ValueError(
                f"{type(self).__name__} needs arguments with SAM fields, but got {kind}. Pass "
                "hf_sam.SAMTrainingArguments, hf_sam.SAMSFTConfig, or add the SAM fields to your config class: "
                f"MyConfig = hf_sam.with_sam({kind})."
            )

    def _check_on_policy(self):
        trl_classes = [base for base in type(self).__mro__ if base.__module__.startswith("trl.")]
        if any(_ON_POLICY_METHODS & vars(base).keys() or base.__name__ in _ON_POLICY_TRAINERS for base in trl_classes):
            raise ValueError(
                f"SAM does not support {type(self).__name__}, which generates its training data inside the step: the "
                "second pass would use different data, and its importance weights would refer to log-probabilities at "
                "the unperturbed weights. Use a trainer that learns from a fixed dataset."
            )

    def _check_substeps(self):
        if self.args.gradient_accumulation_steps == 1:
            return
        for callback in self.callback_handler.callbacks:
            function = type(callback).on_substep_end
            if function is not TrainerCallback.on_substep_end and "grad" in code_names(function):
                raise ValueError(
                    f"{type(callback).__name__}.on_substep_end uses gradients between the micro-batches of a step, but "
                    "SAM computes all of them in the last micro-batch. Change gradients in `training_step`, after "
                    "super().training_step(), or in on_pre_optimizer_step."
                )

    def _check_annealing(self):
        if self._sam_scheduler_given:
            raise ValueError(
                "anneal_steps sets the learning-rate schedule, but a scheduler was passed in `optimizers`. Pass "
                "`optimizers=(optimizer, None)`, or drop anneal_steps."
            )
        if has_own_scheduler(self.accelerator):
            raise ValueError(
                "anneal_steps sets the learning-rate schedule, but the DeepSpeed config has a `scheduler` of its own. "
                "Remove it from the config, or drop anneal_steps."
            )


class SAMTrainer(SAMMixin, Trainer):
    """[`~transformers.Trainer`] with sharpness-aware steps; takes [`SAMTrainingArguments`]. See [`SAMMixin`]."""
