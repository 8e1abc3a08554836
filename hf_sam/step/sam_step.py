"""The two passes of one optimizer step, for any training loop.

The loop calls once for each of the N micro-batches of a step and then clips and steps. All but the last call only keep
their micro-batch; the last one runs the ascent pass over the first k of them, perturbs the weights, runs the descent
pass over all of them, and restores the weights. So between calls the loop sees neither perturbed weights nor ascent
gradients, and a step that is left unfinished has cost nothing.
"""

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .argument_checks import check_kinds, described
from .backends import Backend, select_backend
from .counts import ascent_count, check_count
from .loss_scale import scalers_used
from .metrics import SAMMetrics
from .perturbation import Perturbation
from .replay import KeptInputs, World, WorldState, muted
from .variants import DEFAULT, get_variant


@dataclasses.dataclass
class _MicroBatch:
    forward_backward: Callable[[Any], torch.Tensor]
    inputs: KeptInputs


class SAMStep:
    """The SAM step for a training loop of one's own; [`SAMMixin`] takes the same one inside of a `Trainer`.

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

    Both passes see the same inputs, dropout masks and states of modules, also of modules and random generators that
    `forward_backward` names outside of the model. All of it ends as plain training would leave it. In a loop without
    Accelerate, pass `Accelerator()`; nothing needs to be prepared.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use. Its `sync_gradients` says which call is the
            last of a step, as `accelerator.accumulate` sets it; without accumulation every call is.
        model (`torch.nn.Module`): the model as the loop calls it, after `accelerator.prepare`.
        rho (`float`): radius of the perturbation (arXiv 2010.01412, eq. 2). May be changed between steps.
        optimizer (`torch.optim.Optimizer` or a list of them, *optional*): the optimizers that step after this one. All
            that they train climbs, also what is not in `model` (the weights of a loss), and nothing else does. When
            omitted, those prepared optimizers that train parameters of `model`.
        variant (`str`, *optional*, defaults to `"sam"`): what the perturbation is, a name in
            [`hf_sam.step.variants`](~hf_sam.step.variants): `"sam"` (arXiv 2010.01412) or `"asam"` (arXiv 2102.11600),
            whose rho is on another scale.
        ascent_micro_batches (`float`, *optional*): over how many micro-batches of the step the ascent gradient is
            taken, or which share of them if below 1. All of them when omitted.
        ascent_sync (`str`, *optional*, defaults to `"global"`): `"local"`: each DDP replica climbs along the gradient
            of its own micro-batches.
        target_modules, exclude_modules (`list[str]`, *optional*): regular expressions of the names of the parameters
            to perturb, or not to.
        seed (`int`, *optional*, defaults to 0): seed of the stochastic rounding of 16-bit weights.
        perturbed_context (`Callable[[bool], AbstractContextManager]`, *optional*): around each micro-batch that is
            computed at the perturbed weights, for records that a forward pass makes; called with `True` where the
            same micro-batch was computed at the unperturbed weights before.
        world (`Callable[[torch.nn.Module], World]`, *optional*): makes what captures the states that a pass changes.

    Attributes:
        optimizers (`list[torch.optim.Optimizer]` or `None`): see `optimizer`; may be changed between steps.
        acted (`int`): optimizer steps in which SAM perturbed the weights.
        step (`int`): optimizer steps taken, part of the seed of the stochastic rounding. `state_dict` holds it, so
            that `accelerator.register_for_checkpointing(sam)` makes a resumed run repeat its noise.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a value is out of range, a pattern matches nothing, or SAM cannot be done right in this
            set-up; the message names the remedy.
    """

    def __init__(
        self,
        accelerator,
        model: torch.nn.Module,
        rho: float,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        variant: str = DEFAULT,
        ascent_micro_batches: float | None = None,
        ascent_sync: str = "global",
        target_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        seed: int = 0,
        perturbed_context: Callable[[bool], contextlib.AbstractContextManager] | None = None,
        world: Callable[[torch.nn.Module], World] = World,
    ):
        check_kinds(accelerator, model, optimizer)
        check_count("ascent_micro_batches", ascent_micro_batches, zero_allowed=False)
        if ascent_sync not in ("global", "local"):
            raise ValueError(f"ascent_sync={ascent_sync!r} must be 'global' or 'local'.")
        self.rho = rho
        self.step = 0
        self.acted = 0
        self.ascent_micro_batches = ascent_micro_batches
        self._accelerator = accelerator
        self.optimizers = optimizer if optimizer is None or isinstance(optimizer, list | tuple) else [optimizer]
        self._world = world(model)
        self.backend = select_backend(
            accelerator,
            model,
            variant=get_variant(variant),
            ascent_sync=ascent_sync,
            target=target_modules,
            exclude=exclude_modules,
            outside=self._trained_outside,
            companions=lambda: self._world.companions(),
            seed=seed,
        )
        self._world.bind(self.backend)
        self._metrics = SAMMetrics(accelerator, self.backend.has_coarse_weights())
        self._perturbed_context = perturbed_context or (lambda replayed: contextlib.nullcontext())
        self.reset()

    @property
    def rho(self) -> float:
        """Radius of the perturbation; with 0, a step is a plain one."""
        return self._rho

    @rho.setter
    def rho(self, value: float):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"rho is the radius of the perturbation, a number, but got {described(value)}.")
        if not 0 <= value < float("inf"):
            raise ValueError(f"rho={value} must be a finite number, 0 or larger.")
        self._rho = value

    def reset(self) -> None:
        """Forget the micro-batches of an unfinished step, and the metrics.

        Only for a new start. Where the loop goes on with what an unfinished step accumulated (the end of a stream, a
        callback that stops an epoch), its micro-batches join the next step, as their gradients do in plain training.
        """
        self._window: list[_MicroBatch] = []
        self._start: WorldState | None = None
        self._metrics.reset()

    def __call__(self, forward_backward: Callable[[Any], torch.Tensor], inputs: Any) -> torch.Tensor:
        """Take the next micro-batch; the last one of a step runs both passes and leaves the gradient at w + e.

        Args:
            forward_backward (`Callable`): computes the loss of the inputs, accumulates its gradient, and returns its
                share of the loss of the step, detached, shape `()`. It is called up to twice for each micro-batch.
            inputs (`Any`): the micro-batch. It is copied, because either pass may change it in place.

        Returns:
            `torch.Tensor`: in the last call of a step the loss at w, the sum of the shares (estimated from the ascent
            micro-batches if they are not all), in the others 0; shape `()`. With `rho=0`, each call returns its share.

        Raises:
            RuntimeError: if the model has gradients from before, which would mix with those of this step, or if
                `forward_backward` trains parameters that no known optimizer has.
        """
        if not callable(forward_backward):
            raise TypeError(
                "A SAMStep is called with the function that computes loss and gradient, and then with its inputs, but "
                f"got {described(forward_backward)} first."
            )
        last = self._accelerator.sync_gradients
        if self.rho == 0 and not self._window:
            self.step += last
            return forward_backward(inputs)
        self._window.append(_MicroBatch(forward_backward, KeptInputs(inputs)))
        if not last:
            return torch.zeros((), device=self._accelerator.device)
        window, self._window = self._window, []
        try:
            with self._undone_after_error():
                loss = self._run(window, ascent_count(self.ascent_micro_batches, len(window)))
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)
        self.step += 1
        self.acted += 1
        return loss

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """Around the passes that give the ascent gradient, for loops that keep both passes in their own hands.

        ```python
        with sam.ascent():
            accelerator.backward(loss_of(batch))
        with sam.perturbed():
            accelerator.backward(loss_of(batch))
        optimizer.step()
        ```

        Under DeepSpeed, which steps inside of `backward`, each context may hold one backward pass.

        Raises:
            RuntimeError: between the micro-batches of `accelerator.accumulate`, or if the model has gradients from
                before.
        """
        self._check_synchronizing()
        with self._undone_after_error():
            self._begin([])
            start = self._world.capture()
            with self.backend.ascent_pass(), scalers_used() as self._scalers:
                yield
            self._check_bystanders()
        self._start = start

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[Perturbation]:
        """Inside, the weights are w + e, the gradients empty, and the random streams those of the ascent pass.

        Afterwards the weights are w again, bit for bit, the gradients are those at w + e, and random streams and
        buffers as the ascent pass left them. After an error the weights are w and there are no gradients.

        Yields:
            [`~hf_sam.step.perturbation.Perturbation`]: norm of the ascent gradient, and whether it was finite.

        Raises:
            RuntimeError: if there was no `ascent` before. (DeepSpeed would have stepped in a backward pass outside.)
        """
        start, self._start = self._start, None
        if start is None:
            raise RuntimeError("SAMStep.perturbed() needs an ascent gradient: run a backward pass in ascent() before.")
        self._check_synchronizing()
        self._world.learn()
        end = self._world.capture()
        try:
            with self._undone_after_error():
                with self.backend.descent_pass():
                    perturbation = self.backend.perturb(self.rho, step=self.step)
                    start.restore(end=False)
                    scale = self.backend.loss_scale(self._scalers)
                    yield dataclasses.replace(perturbation, norm=perturbation.norm / scale)
                self.backend.restore()
        finally:
            end.restore()
        self.step += 1
        self.acted += 1

    def _check_synchronizing(self):
        if not self._accelerator.sync_gradients:
            raise RuntimeError(
                "The contexts of SAMStep enclose a whole optimizer step, but accelerator.accumulate is at a "
                "micro-batch before the last one. Enclose all micro-batches of a step, or call the SAMStep with each."
            )

    def pop_metrics(self) -> dict[str, float]:
        """The `sam/...` metrics, averaged over the steps since the last call.

        Waits for the device, but for no other rank. Warns, once each, about what the metrics show to be wrong. Steps in
        `ascent` and `perturbed`, whose losses are not known here, do not count.
        """
        return self._metrics.pop()

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"step": self.step, "acted": self.acted, "variant": self.backend.variant.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""
        self.step, self.acted = state["step"], state["acted"]
        self.backend.variant.load_state_dict(state["variant"])

    @contextlib.contextmanager
    def _undone_after_error(self):
        try:
            yield
        except BaseException:
            # Whoever catches this finds the weights of before the step and no half of a gradient.
            try:
                self.backend.restore(after_error=True)
            finally:
                self.backend.clear_gradients()
            raise

    def _trained_outside(self, backend: Backend) -> dict[str, torch.Tensor]:
        """What the optimizers train outside of the model, by name."""
        inside = {id(param) for param in backend.model.parameters()}
        trained: dict[int, torch.Tensor] = {}
        optimizers = self._accelerator._optimizers if self.optimizers is None else self.optimizers
        for optimizer in optimizers:
            params = {id(param): param for param in backend.parameters_of(optimizer)}
            # Without a word of the user's, an optimizer of other parameters alone belongs to another step.
            if self.optimizers is not None or inside & params.keys():
                trained.update(params)
        trained = {key: param for key, param in trained.items() if key not in inside and param.requires_grad}
        names = {id(param): name for name, param in self._world.outside_parameters(inside).items()}
        return {names.get(key, f"optimizer.{i}"): param for i, (key, param) in enumerate(trained.items())}

    def _begin(self, functions: list[Callable]) -> None:
        self._world.begin_step(functions)
        inside = {id(param) for model in self.backend.models for param in model.parameters()}
        self._bystanders = self._world.outside_parameters(inside)
        self.backend.begin_step(self._bystanders.values())

    def _check_bystanders(self) -> None:
        if self.optimizers is not None:
            return  # what they do not have is not trained in this step
        touched = {id(param) for param in self.backend.touched_bystanders()}
        names = [name for name, param in self._bystanders.items() if id(param) in touched]
        if names:
            raise RuntimeError(
                f"The step reaches {len(names)} trainable parameters that are not in the model of SAMStep nor in its "
                f"optimizer ({', '.join(names[:3])}), so it is not known whether they climb. Name the optimizers that "
                "step after it: SAMStep(accelerator, model, rho, optimizer=[...]). What they train climbs; what they "
                "do not train only gets its gradient."
            )

    def _run(self, window: list[_MicroBatch], k: int) -> torch.Tensor:
        backend, world = self.backend, self._world
        self._begin([micro_batch.forward_backward for micro_batch in window])
        states, losses = [], []
        with backend.ascent_pass(), scalers_used() as scalers:
            for i, micro_batch in enumerate(window[:k]):
                states.append(world.capture())
                inputs = micro_batch.inputs.for_ascent(last=i == len(window) - 1)
                losses.append(self._compute(micro_batch, inputs, last=i == k - 1))
        self._check_bystanders()
        world.learn()
        end_of_ascent = world.capture()

        try:
            with backend.descent_pass(), muted(self._accelerator, "log"):
                perturbation = backend.perturb(self.rho, step=self.step, measure=self._metrics.wants_kept)
                perturbed_losses = self._descend(window, states, end_of_ascent)
        except BaseException:
            end_of_ascent.restore()
            raise
        if k == len(window):
            end_of_ascent.restore()
        backend.restore()
        world.end_step()

        # With k of N micro-batches in the ascent pass, estimates for all N of them.
        scale = len(window) / k
        clean, perturbed = sum(losses) * scale, sum(perturbed_losses) * scale
        norm = perturbation.norm * (scale / backend.loss_scale(scalers))
        alone = backend.runs_uneven_inputs()
        self._metrics.update(clean, perturbed, norm, perturbation, self.rho, alone=alone)
        return clean

    def _descend(self, window, states, end_of_ascent) -> list[torch.Tensor]:
        """The losses at w + e of the micro-batches that have a state of the ascent pass."""
        losses = []
        for i, micro_batch in enumerate(window):
            last, replayed = i == len(window) - 1, i < len(states)
            if replayed:
                states[i].restore(end=False)
                states[i] = None  # what it holds is not needed any more
            elif i == len(states):
                end_of_ascent.restore()
            with self._perturbed_context(replayed):
                loss = self._compute(micro_batch, micro_batch.inputs.for_descent(), last)
            if replayed:
                losses.append(loss)
        return losses

    def _compute(self, micro_batch, inputs, last) -> torch.Tensor:
        self._accelerator.gradient_state._set_sync_gradients(last)
        with self.backend.micro_batch(last):
            loss = micro_batch.forward_backward(inputs)
        if not isinstance(loss, torch.Tensor) or loss.ndim > 0:
            raise TypeError(
                "The function given to a SAMStep must return the share of the loss that its micro-batch has, a tensor "
                f"of shape (), but returned {described(loss)}."
            )
        # Cloned, because a CUDA graph overwrites its output in its next run.
        return loss.detach().clone()
