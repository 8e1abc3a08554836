"""The two passes of one optimizer step, inside the calls that the host makes, one a micro-batch.

The host calls once for each of the N micro-batches of a step and then clips and steps. All but the last call only keep
their micro-batch; the last one runs the ascent pass over the first k of them, perturbs the weights, runs the descent
pass over all of them, and restores the weights. So between calls the host sees neither perturbed weights nor ascent
gradients, and a step that the host leaves unfinished has cost nothing.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .backends import Backend
from .metrics import SAMMetrics
from .replay import BufferState, RandomState


@dataclass
class _MicroBatch:
    forward_backward: Callable[[Any], torch.Tensor]
    inputs: Any


class TwoPassStep:
    """Collects the micro-batches of a step and takes both passes over them.

    Args:
        accelerator (`accelerate.Accelerator`): says which call is the last of a step, through `sync_gradients`.
        metrics ([`~hf_sam.metrics.SAMMetrics`]): receives losses and norms.
        replay_context (`Callable[[], AbstractContextManager]`): around each micro-batch that is computed a second
            time, for state of the caller's that a forward pass advances.
    """

    def __init__(
        self,
        accelerator,
        metrics: SAMMetrics,
        replay_context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._accelerator = accelerator
        self._metrics = metrics
        self._replay_context = replay_context
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches of an unfinished step.

        Only for a new start. Where the host goes on with what an unfinished step accumulated (the end of a stream, a
        callback that stops an epoch), its micro-batches join the next step, as their gradients do in plain training.
        """
        self._window: list[_MicroBatch] = []
        self._buffers = BufferState()

    def add(
        self,
        forward_backward: Callable[[Any], torch.Tensor],
        inputs: Any,
        backend: Backend,
        *,
        rho: float,
        step: int,
        ascent_count: Callable[[int], int],
    ) -> torch.Tensor:
        """Take the next micro-batch; the last one of a step runs the step.

        Args:
            forward_backward (`Callable`): the host's own step for this micro-batch: computes the loss of the inputs,
                accumulates its gradient, and returns the loss, detached, shape `()`.
            inputs (`Any`): the micro-batch as the host got it.
            backend ([`~hf_sam.backends.Backend`]): perturbs and restores.
            rho (`float`): radius of the perturbation.
            step (`int`): optimizer step, counted from 0.
            ascent_count (`Callable[[int], int]`): how many of N micro-batches, the first ones, the ascent pass uses.

        Returns:
            `torch.Tensor`: the unperturbed loss of the step in the last call, estimated from the ascent micro-batches
            if they are not all, and 0 in the others; shape `()`.
        """
        self._window.append(_MicroBatch(forward_backward, inputs))
        if not self._accelerator.sync_gradients:
            return torch.zeros((), device=self._accelerator.device)
        window, self._window = self._window, []
        try:
            return self._run(window, ascent_count(len(window)), backend, rho, step)
        except BaseException:
            # Whoever catches this finds the weights of before the step and no half of a gradient.
            try:
                backend.restore(after_error=True)
            finally:
                backend.clear_gradients()
            raise
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)

    def _run(self, window, k, backend, rho, step) -> torch.Tensor:
        backend.begin_step()
        states, losses = [], []
        with backend.ascent_pass():
            for i, micro_batch in enumerate(window[:k]):
                states.append(RandomState.capture(backend.devices))
                with self._buffers.observed(backend.model):
                    # The host's step may take keys out of the inputs, which the second pass needs again.
                    inputs = copy.copy(micro_batch.inputs)
                    losses.append(self._compute(backend, micro_batch, inputs, last=i == k - 1))
        end_of_ascent = RandomState.capture(backend.devices)

        perturbed_losses = []
        with backend.descent_pass():
            perturbation = backend.perturb(rho, step=step, measure=self._metrics.wants_kept)
            for i, micro_batch in enumerate(window):
                last = i == len(window) - 1
                if i < k:
                    states[i].restore()
                    with self._buffers.preserved(backend.model), self._replay_context():
                        perturbed_losses.append(self._compute(backend, micro_batch, micro_batch.inputs, last))
                else:
                    if i == k:
                        end_of_ascent.restore()
                    self._compute(backend, micro_batch, micro_batch.inputs, last)
        if k == len(window):
            end_of_ascent.restore()
        backend.restore()

        # With k of N micro-batches in the ascent pass, estimates for all N of them.
        scale = len(window) / k
        clean, perturbed = sum(losses) * scale, sum(perturbed_losses) * scale
        self._metrics.update(clean, perturbed, perturbation.norm * (scale / backend.loss_scale()), perturbation)
        return clean

    def _compute(self, backend, micro_batch, inputs, last) -> torch.Tensor:
        self._accelerator.gradient_state._set_sync_gradients(last)
        with backend.micro_batch(last):
            # Cloned, because a CUDA graph overwrites its output in its next run.
            return micro_batch.forward_backward(inputs).clone()
