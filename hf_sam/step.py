"""The two passes of one optimizer step, for any training loop.

The loop calls once for each of the N micro-batches of a step and then clips and steps. All but the last call only keep
their micro-batch; the last one runs the ascent pass over the first k of them, perturbs the weights, runs the descent
pass over all of them, and restores the weights. So between calls the loop sees neither perturbed weights nor ascent
gradients, and a step that is left unfinished has cost nothing.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .arguments import check_count
from .backends import select_backend
from .metrics import SAMMetrics
from .perturbation import Perturbation
from .replay import BufferState, RandomState
from .schedule import ascent_count


@dataclasses.dataclass
class _MicroBatch:
    forward_backward: Callable[[Any], torch.Tensor]
    inputs: Any


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

    Dropout masks are the same in both passes, and random streams, BatchNorm statistics and other buffers end as they
    would in plain training. In a loop without Accelerate, pass `Accelerator()`; nothing needs to be prepared.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use. Its `sync_gradients` says which call is the
            last of a step, as `accelerator.accumulate` sets it; without accumulation every call is.
        model (`torch.nn.Module`): the model as the loop calls it, after `accelerator.prepare`.
        rho (`float`): radius of the perturbation (arXiv 2010.01412, eq. 2). May be changed between steps.
        adaptive (`bool`, *optional*, defaults to `False`): ASAM (arXiv 2102.11600, eq. 8).
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

    Attributes:
        step (`int`): optimizer steps taken, part of the seed of the stochastic rounding. `state_dict` holds it, so
            that `accelerator.register_for_checkpointing(sam)` makes a resumed run repeat its noise.

    Raises:
        ValueError: if a value is out of range, a pattern matches nothing, or SAM cannot be done right in this
            set-up; the message names the remedy.
    """

    def __init__(
        self,
        accelerator,
        model: torch.nn.Module,
        rho: float,
        *,
        adaptive: bool = False,
        ascent_micro_batches: float | None = None,
        ascent_sync: str = "global",
        target_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        seed: int = 0,
        perturbed_context: Callable[[bool], contextlib.AbstractContextManager] | None = None,
    ):
        check_count("ascent_micro_batches", ascent_micro_batches, zero_allowed=False)
        if ascent_sync not in ("global", "local"):
            raise ValueError(f"ascent_sync={ascent_sync!r} must be 'global' or 'local'.")
        self.rho = rho
        self.step = 0
        self.ascent_micro_batches = ascent_micro_batches
        self.backend = select_backend(
            accelerator,
            model,
            adaptive=adaptive,
            ascent_sync=ascent_sync,
            target=target_modules,
            exclude=exclude_modules,
            seed=seed,
        )
        self._accelerator = accelerator
        self._metrics = SAMMetrics(accelerator)
        self._perturbed_context = perturbed_context or (lambda replayed: contextlib.nullcontext())
        self.reset()

    @property
    def rho(self) -> float:
        """Radius of the perturbation; with 0, a step is a plain one."""
        return self._rho

    @rho.setter
    def rho(self, value: float):
        if not 0 <= value < float("inf"):
            raise ValueError(f"rho={value} must be a finite number, 0 or larger.")
        self._rho = value

    def reset(self) -> None:
        """Forget the micro-batches of an unfinished step, and the metrics.

        Only for a new start. Where the loop goes on with what an unfinished step accumulated (the end of a stream, a
        callback that stops an epoch), its micro-batches join the next step, as their gradients do in plain training.
        """
        self._window: list[_MicroBatch] = []
        self._buffers = BufferState()
        self._start_of_ascent: RandomState | None = None
        self._metrics.reset()

    def __call__(self, forward_backward: Callable[[Any], torch.Tensor], inputs: Any) -> torch.Tensor:
        """Take the next micro-batch; the last one of a step runs both passes and leaves the gradient at w + e.

        Args:
            forward_backward (`Callable`): computes the loss of the inputs, accumulates its gradient, and returns its
                share of the loss of the step, detached, shape `()`. It is called up to twice for each micro-batch.
            inputs (`Any`): the micro-batch; kept until the last one arrives, so it must not be changed in between.

        Returns:
            `torch.Tensor`: in the last call of a step the loss at w, the sum of the shares (estimated from the ascent
            micro-batches if they are not all), in the others 0; shape `()`. With `rho=0`, each call returns its share.

        Raises:
            RuntimeError: if the model has gradients from before, which would mix with those of this step.
        """
        last = self._accelerator.sync_gradients
        if self.rho == 0 and not self._window:
            self.step += last
            return forward_backward(inputs)
        self._window.append(_MicroBatch(forward_backward, inputs))
        if not last:
            return torch.zeros((), device=self._accelerator.device)
        window, self._window = self._window, []
        try:
            with self._undone_after_error():
                loss = self._run(window, ascent_count(self.ascent_micro_batches, len(window)))
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)
        self.step += 1
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
            self.backend.begin_step()
            start = RandomState.capture(self.backend.devices)
            with self.backend.ascent_pass(), self._buffers.observed(self.backend.model):
                yield
        self._start_of_ascent = start

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[Perturbation]:
        """Inside, the weights are w + e, the gradients empty, and the random streams those of the ascent pass.

        Afterwards the weights are w again, bit for bit, the gradients are those at w + e, and random streams and
        buffers as the ascent pass left them. After an error the weights are w and there are no gradients.

        Yields:
            [`~hf_sam.perturbation.Perturbation`]: norm of the ascent gradient, and whether it was finite.

        Raises:
            RuntimeError: if there was no `ascent` before. (DeepSpeed would have stepped in a backward pass outside.)
        """
        start, self._start_of_ascent = self._start_of_ascent, None
        if start is None:
            raise RuntimeError("SAMStep.perturbed() needs an ascent gradient: run a backward pass in ascent() before.")
        self._check_synchronizing()
        end = RandomState.capture(self.backend.devices)
        with self._undone_after_error():
            with self.backend.descent_pass(), self._buffers.preserved(self.backend.model):
                perturbation = self.backend.perturb(self.rho, step=self.step)
                start.restore()
                yield dataclasses.replace(perturbation, norm=perturbation.norm / self.backend.loss_scale())
            self.backend.restore()
        end.restore()
        self.step += 1

    def _check_synchronizing(self):
        if not self._accelerator.sync_gradients:
            raise RuntimeError(
                "The contexts of SAMStep enclose a whole optimizer step, but accelerator.accumulate is at a "
                "micro-batch before the last one. Enclose all micro-batches of a step, or call the SAMStep with each."
            )

    def pop_metrics(self) -> dict[str, float]:
        """The `sam/...` metrics, averaged over the steps since the last call; waits for the device.

        Steps in `ascent` and `perturbed`, whose losses are not known here, do not count.
        """
        return self._metrics.pop()

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""
        self.step = state["step"]

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

    def _run(self, window: list[_MicroBatch], k: int) -> torch.Tensor:
        backend = self.backend
        backend.begin_step()
        states, losses = [], []
        with backend.ascent_pass():
            for i, micro_batch in enumerate(window[:k]):
                states.append(RandomState.capture(backend.devices))
                with self._buffers.observed(backend.model):
                    # The loop's own step may take keys out of the inputs, which the second pass needs again.
                    inputs = copy.copy(micro_batch.inputs)
                    losses.append(self._compute(micro_batch, inputs, last=i == k - 1))
        end_of_ascent = RandomState.capture(backend.devices)

        perturbed_losses = []
        with backend.descent_pass():
            perturbation = backend.perturb(self.rho, step=self.step, measure=self._metrics.wants_kept)
            for i, micro_batch in enumerate(window):
                last, replayed = i == len(window) - 1, i < k
                if replayed:
                    states[i].restore()
                elif i == k:
                    end_of_ascent.restore()
                buffers = self._buffers.preserved(backend.model) if replayed else contextlib.nullcontext()
                with buffers, self._perturbed_context(replayed):
                    loss = self._compute(micro_batch, micro_batch.inputs, last)
                if replayed:
                    perturbed_losses.append(loss)
        if k == len(window):
            end_of_ascent.restore()
        backend.restore()

        # With k of N micro-batches in the ascent pass, estimates for all N of them.
        scale = len(window) / k
        clean, perturbed = sum(losses) * scale, sum(perturbed_losses) * scale
        self._metrics.update(clean, perturbed, perturbation.norm * (scale / backend.loss_scale()), perturbation)
        return clean

    def _compute(self, micro_batch, inputs, last) -> torch.Tensor:
        self._accelerator.gradient_state._set_sync_gradients(last)
        with self.backend.micro_batch(last):
            # Cloned, because a CUDA graph overwrites its output in its next run.
            return micro_batch.forward_backward(inputs).clone()
