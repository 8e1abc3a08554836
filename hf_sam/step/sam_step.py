"""The passes of one optimizer step, for any training loop.

The loop calls [`SAMStep`] once for each of the N micro-batches of an optimizer step. All calls but the last only store
the micro-batch. The last call runs the ascent pass over the first k micro-batches (if the variant has one), perturbs
the weights, runs the descent pass over all N micro-batches, and restores the weights. So between calls the loop never
sees perturbed weights or ascent gradients, and an unfinished step costs nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .argument_checks import check_one_pass, check_types, describe
from .backends import Backend, select_backend
from .counts import ascent_count, check_count
from .loss_scale import record_scalers
from .metrics import SAMMetrics
from .moments import check_optimizer
from .passes import MicroBatch, Passes
from .perturbation import Perturbation
from .replay import CapturedState, KeptInputs, LoopState, disable_method
from .strength import Strength
from .variants import DEFAULT, get_variant


class SAMStep(Strength):
    """The SAM step for a custom training loop. [`SAMMixin`] uses it inside `Trainer`.

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sam = SAMStep(accelerator, model, rho=0.05)

    def forward_backward(batch):
        loss = model(**batch).loss
        accelerator.backward(loss)
        return loss.detach() / accelerator.gradient_accumulation_steps

    for batch in loader:
        with accelerator.accumulate(model):
            loss = sam(forward_backward, batch)
            optimizer.step()
            optimizer.zero_grad()
    ```

    Both passes see the same inputs, dropout masks and module states, and the same states of the modules and random
    generators that `forward_backward` refers to. After the step, all of these are as after a plain step. In a loop
    without Accelerate, pass `Accelerator()`; nothing needs to be prepared.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use. Its `sync_gradients`, which
            `accelerator.accumulate` sets, marks the last call of a step. Without accumulation, every call is the last.
        model (`torch.nn.Module`): the model that the loop calls, after `accelerator.prepare`.
        rho (`float`): radius of the perturbation (arXiv 2010.01412, eq. 2). May be changed between steps.
        noise (`float`, *optional*, defaults to 0): standard deviation of random noise that is added to the weights
            during the passes of the perturbed gradient, relative to each weight; with `rho=0`, the only perturbation.
            May be changed between steps.
        loss_rise (`float`, *optional*, defaults to 0): if not 0, the radius of each step is `loss_rise` / ||g||, so
            that the loss rises by `loss_rise` nats to first order, but at most `rho`, which may be infinite
            (arXiv 2605.10183). May be changed between steps.
        optimizer (`torch.optim.Optimizer` or a list of them, *optional*): the optimizers that step after the two
            passes. SAM perturbs the parameters that they train, including those outside of `model` (e.g. in a loss
            module), and no others. When omitted, the prepared optimizers that train parameters of `model`.
        variant (`str`, *optional*, defaults to `"sam"`): name of a variant in
            [`hf_sam.step.variants`](~hf_sam.step.variants), which defines the perturbation: `"sam"` (arXiv 2010.01412),
            `"asam"` (arXiv 2102.11600), whose rho is on another scale, or `"momentum"` (arXiv 2401.12033), which has no
            ascent pass.
        ascent_micro_batches (`float`, *optional*): number of micro-batches in the ascent pass, or the fraction of the
            step's micro-batches if below 1. All of them when omitted.
        ascent_sync (`str`, *optional*, defaults to `"global"`): with `"local"`, each DDP replica uses the ascent
            gradient of its own micro-batches.
        target_modules, exclude_modules (`list[str]`, *optional*): regular expressions over the names of the parameters
            to perturb, and not to perturb.
        seed (`int`, *optional*, defaults to 0): seed of `noise`, and of the stochastic rounding of 16-bit weights.
        perturbed_context (`Callable[[bool], AbstractContextManager]`, *optional*): context around each micro-batch at
            the perturbed weights, to control what the forward pass records. The argument is `True` if the same
            micro-batch has been computed at the unperturbed weights.
        loop_state (`Callable[[torch.nn.Module], LoopState]`, *optional*): creates the object that captures and restores
            the states that a pass changes.

    Attributes:
        optimizers (`list[torch.optim.Optimizer]` or `None`): see `optimizer`; may be changed between steps.
        acted (`int`): number of optimizer steps in which SAM perturbed the weights.
        step (`int`): number of optimizer steps; part of the seed of noise and stochastic rounding. It is in
            `state_dict`, so with `accelerator.register_for_checkpointing(sam)` a resumed run draws the same numbers.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range, a pattern matches nothing, or SAM does not support this set-up; the
            message names the remedy.
    """

    def __init__(
        self,
        accelerator,
        model: torch.nn.Module,
        rho: float,
        *,
        noise: float = 0.0,
        loss_rise: float = 0.0,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        variant: str = DEFAULT,
        ascent_micro_batches: float | None = None,
        ascent_sync: str = "global",
        target_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        seed: int = 0,
        perturbed_context: Callable[[bool], contextlib.AbstractContextManager] | None = None,
        loop_state: Callable[[torch.nn.Module], LoopState] = LoopState,
    ):
        check_types(accelerator, model, optimizer)
        check_count("ascent_micro_batches", ascent_micro_batches, zero_allowed=False)
        if ascent_sync not in ("global", "local"):
            raise ValueError(f"ascent_sync={ascent_sync!r} must be 'global' or 'local'.")
        self.noise, self.loss_rise, self.rho = noise, loss_rise, rho
        self.check_radius()
        self.step = self.acted = 0
        self.ascent_micro_batches = ascent_micro_batches
        self._accelerator = accelerator
        self.optimizers = optimizer if optimizer is None or isinstance(optimizer, list | tuple) else [optimizer]
        self._loop_state = loop_state(model)
        self.backend = select_backend(
            accelerator,
            model,
            variant=get_variant(variant),
            ascent_sync=ascent_sync,
            target=target_modules,
            exclude=exclude_modules,
            outside_parameters=self._trained_outside,
            outside_modules=lambda: self._loop_state.outside_modules(),
            optimizers=self._known_optimizers,
            seed=seed,
        )
        check_one_pass(self.backend.variant, loss_rise, ascent_micro_batches, ascent_sync)
        if self.backend.variant.moments and rho > 0:
            for each in self._training_optimizers(self.backend):
                check_optimizer(each, self.backend.variant.moments)
        self._loop_state.bind(self.backend)
        self._metrics = SAMMetrics(accelerator, self.backend.has_low_precision_weights())
        without_context = lambda replayed: contextlib.nullcontext()  # noqa: E731
        self._passes = Passes(accelerator, self.backend, self._loop_state, perturbed_context or without_context)
        self.reset()

    @property
    def _ascends(self) -> bool:
        """Whether the next step has an ascent pass."""
        return self.rho > 0 and self.backend.variant.passes == 2

    @property
    def _takes_ascent(self) -> bool:
        """Whether `perturbed` needs an `ascent` before it; a step with `rho=0` may have one."""
        return self._ascends or (self.rho == 0 and self.noise == 0)

    def reset(self) -> None:
        """Drop the micro-batches of an unfinished step, and the metrics.

        Call it only to start over. If the loop continues after an unfinished step (end of a stream, an epoch stopped by
        a callback), the stored micro-batches become part of the next step, as accumulated gradients do in plain
        training.
        """
        self._window: list[MicroBatch] = []
        self._start: CapturedState | None = None
        self._metrics.reset()

    def __call__(self, forward_backward: Callable[[Any], torch.Tensor], inputs: Any) -> torch.Tensor:
        """Store the next micro-batch; the last call of a step runs both passes and leaves the gradient at w + e.

        Args:
            forward_backward (`Callable`): computes the loss of `inputs`, accumulates its gradient, and returns the
                detached contribution to the loss of the step, shape `()`. Called up to twice for each micro-batch.
            inputs (`Any`): the micro-batch. It is copied, because a pass may change it in place.

        Returns:
            `torch.Tensor`: shape `()`. The last call of a step returns the loss at w (an estimate if the ascent pass
            uses only some of the micro-batches; without an ascent pass, the loss at w + e), the other calls 0. With
            `rho=0`, each call returns the contribution of its micro-batch.

        Raises:
            RuntimeError: if the model has gradients from before the step, or, in a step with an ascent pass,
                `forward_backward` computes gradients of parameters that no known optimizer trains.
        """
        if not callable(forward_backward):
            raise TypeError(
                "The first argument of a SAMStep call must be the function that computes loss and gradient, the second "
                f"its inputs, but got {describe(forward_backward)} first."
            )
        self.check_radius()
        last = self._accelerator.sync_gradients
        if self.rho == 0 and self.noise == 0 and not self._window:
            self.step += last
            return forward_backward(inputs)
        copied = self._ascends or not last  # in a single pass, the last micro-batch is computed at once
        self._window.append(MicroBatch(forward_backward, KeptInputs(inputs, copied)))
        if not last:
            return torch.zeros((), device=self._accelerator.device)
        window, self._window = self._window, []
        try:
            with self._rollback_on_error():
                loss = self._run(window, ascent_count(self.ascent_micro_batches, len(window)))
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)
        self.step += 1
        self.acted += 1
        return loss

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """Context for the ascent pass, for loops that run both passes themselves.

        ```python
        with sam.ascent():
            accelerator.backward(loss_of(batch))
        with sam.perturbed():
            accelerator.backward(loss_of(batch))
        optimizer.step()
        ```

        Under DeepSpeed, which steps inside `backward`, each context may contain only one backward pass.

        Raises:
            RuntimeError: before the last micro-batch of `accelerator.accumulate`, or if the model has gradients from
                before the step.
        """
        self._check_synchronizing()
        if not self._takes_ascent:
            what = f"The variant {self.backend.variant.name!r}" if self.rho > 0 else "A step with noise only"
            raise RuntimeError(f"{what} has no ascent pass: enclose the backward pass in SAMStep.perturbed() only.")
        with self._rollback_on_error():
            self._begin([])
            start = self._loop_state.capture()
            with self.backend.ascent_pass(), record_scalers() as self._scalers:
                yield
            self._check_bystanders()
        self._start = start

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[Perturbation]:
        """Context for the descent pass: weights are w + e, gradients are cleared, random states are reset.

        On exit, the weights are bitwise w again, the gradients are those at w + e, and random states and buffers are
        as after the ascent pass. After an error, the weights are w and the gradients are cleared.

        Yields:
            [`~hf_sam.step.perturbation.Perturbation`]: norm of the ascent gradient, and whether it is finite.

        Raises:
            RuntimeError: without a preceding `ascent` context. (Under DeepSpeed, a backward pass outside of it would
                already have stepped.)
        """
        if not self._takes_ascent:
            yield from self._perturbed_only()
            return
        start, self._start = self._start, None
        if start is None:
            raise RuntimeError("SAMStep.perturbed() needs an ascent gradient: run a backward pass in ascent() before.")
        self._check_synchronizing()
        self._loop_state.end_ascent()
        end = self._loop_state.capture()
        try:
            with self._rollback_on_error():
                with self.backend.descent_pass():
                    perturbation = self._perturb(1 / self.backend.loss_scale(self._scalers))
                    start.restore(end=False)
                    yield perturbation
                self.backend.restore()
        finally:
            end.restore()
        self.step += 1
        self.acted += 1

    def _perturbed_only(self) -> Iterator[Perturbation]:
        self._check_synchronizing()
        with self._rollback_on_error():
            self._begin([])
            with self.backend.descent_pass():
                yield self._perturb()
            self.backend.restore()
        self.step += 1
        self.acted += 1

    def _check_synchronizing(self):
        if not self._accelerator.sync_gradients:
            raise RuntimeError(
                "The contexts of SAMStep enclose a whole optimizer step, but accelerator.accumulate has not reached "
                "its last micro-batch. Enclose all micro-batches of a step, or call the SAMStep for each of them."
            )

    def pop_metrics(self) -> dict[str, float]:
        """The `sam/...` metrics, averaged over the steps since the last call.

        Waits for the device, but not for other ranks. Warns once about each problem that the metrics show. Steps with
        `ascent` and `perturbed` are not included, because their losses are not known here.
        """
        return self._metrics.pop()

    def state_dict(self) -> dict:
        """The state that a resumed run needs."""
        return {"step": self.step, "acted": self.acted, "variant": self.backend.variant.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load a state from `state_dict`."""
        self.step, self.acted = state["step"], state["acted"]
        self.backend.variant.load_state_dict(state["variant"])

    @contextlib.contextmanager
    def _rollback_on_error(self):
        try:
            yield
        except BaseException:
            # If the caller catches the error, weights are as before the step and there are no partial gradients.
            try:
                self.backend.restore(after_error=True)
            finally:
                self.backend.clear_gradients()
            raise

    def _known_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return self._accelerator._optimizers if self.optimizers is None else self.optimizers

    def _training_optimizers(self, backend: Backend) -> Iterator[torch.optim.Optimizer]:
        """The optimizers that step afterwards."""
        inside = {id(param) for param in backend.model.parameters()}
        for optimizer in self._known_optimizers():
            # An optimizer that trains no parameter of the model belongs to another step, unless the user passed it.
            if self.optimizers is not None or inside & {id(param) for param in backend.parameters_of(optimizer)}:
                yield optimizer

    def _trained_outside(self, backend: Backend) -> dict[str, torch.Tensor]:
        """Parameters outside of the model that the optimizers train, by name."""
        inside = {id(param) for param in backend.model.parameters()}
        trained: dict[int, torch.Tensor] = {}
        for optimizer in self._training_optimizers(backend):
            trained.update({id(param): param for param in backend.parameters_of(optimizer)})
        trained = {key: param for key, param in trained.items() if key not in inside and param.requires_grad}
        names = {id(param): name for name, param in self._loop_state.outside_parameters(inside).items()}
        return {names.get(key, f"optimizer.{i}"): param for i, (key, param) in enumerate(trained.items())}

    def _begin(self, functions: list[Callable]) -> None:
        self._loop_state.begin_step(functions)
        inside = {id(param) for model in self.backend.models for param in model.parameters()}
        self._bystanders = self._loop_state.outside_parameters(inside)
        self.backend.begin_step(self._bystanders.values())

    def _check_bystanders(self) -> None:
        if self.optimizers is not None:
            return  # the user passed the optimizers, so other parameters are not trained in this step
        touched = {id(param) for param in self.backend.bystanders_with_gradient()}
        names = [name for name, param in self._bystanders.items() if id(param) in touched]
        if names:
            raise RuntimeError(
                f"The step computes gradients of {len(names)} trainable parameters that are neither in the model of "
                f"SAMStep nor in a known optimizer ({', '.join(names[:3])}), so it is not clear whether to perturb "
                "them. Pass the optimizers that step afterwards: SAMStep(accelerator, model, rho, optimizer=[...]). "
                "SAM then perturbs exactly the parameters that they train."
            )

    def _run(self, window: list[MicroBatch], k: int) -> torch.Tensor:
        self._begin([micro_batch.forward_backward for micro_batch in window])
        if not self._ascends:
            return self._run_one_pass(window)
        ascent = self._passes.ascent(window, k)
        self._check_bystanders()
        # With k of N micro-batches in the ascent pass, losses and gradients are scaled to all N.
        scale = len(window) / k
        try:
            with self.backend.descent_pass(), disable_method(self._accelerator, "log"):
                perturbation = self._perturb(
                    scale / self.backend.loss_scale(ascent.scalers), measure=self._metrics.measures_kept
                )
                perturbed_losses = self._passes.descent(window, ascent)
        except BaseException:
            ascent.end.restore()
            raise
        if k == len(window):
            ascent.end.restore()
        self.backend.restore()
        self._loop_state.end_step()
        clean, perturbed = sum(ascent.losses) * scale, sum(perturbed_losses) * scale
        uneven = self.backend.has_uneven_inputs()
        settings = {"rho": self.rho, "loss_rise": self.loss_rise, "noise": self.noise}
        self._metrics.update(clean, perturbed, perturbation, **settings, uneven_inputs=uneven)
        return clean

    def _run_one_pass(self, window: list[MicroBatch]) -> torch.Tensor:
        with self.backend.descent_pass():
            self._perturb()
            losses = self._passes.single(window)
        self.backend.restore()
        return sum(losses)

    def _perturb(self, gradient_scale: torch.Tensor | float = 1.0, measure: bool = False) -> Perturbation:
        return self.backend.perturb(
            self.rho,
            noise=self.noise,
            loss_rise=self.loss_rise,
            gradient_scale=gradient_scale,
            step=self.step,
            measure=measure,
        )
