"""The two passes of one optimizer step, spread over the calls that the host makes, one a micro-batch.

The host calls once for each of the N micro-batches of a step and then clips and steps. The ascent pass over the first
k of them happens as they arrive, except that its last one waits for the last call, the only one in which the host lets
gradients be synchronized. In that call the weights are perturbed, all N micro-batches are (re)computed, and the
weights are restored: between calls the host never sees perturbed weights.
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
    random_state: RandomState | None = None
    loss: torch.Tensor | None = None


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
        """Forget the micro-batches of an unfinished step, whose gradients are dropped too.

        Where the host lets a step begin with what an unfinished one accumulated (the end of a stream, a callback that
        stops an epoch), the micro-batches stay for that step, as their gradients do in plain training.
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
        micro_batches: int,
        ascent_micro_batches: int,
    ) -> torch.Tensor:
        """Take the next micro-batch; the last one of the step runs whatever is still to be run.

        Args:
            forward_backward (`Callable`): the host's own step for this micro-batch: computes the loss of the inputs,
                accumulates its gradient, and returns the loss, detached, shape `()`.
            inputs (`Any`): the micro-batch as the host got it.
            backend ([`~hf_sam.backends.Backend`]): perturbs and restores.
            rho (`float`): radius of the perturbation.
            step (`int`): optimizer step, counted from 0.
            micro_batches (`int`): N, how many micro-batches the step has.
            ascent_micro_batches (`int`): k, how many of them, the first ones, the ascent gradient is taken over.

        Returns:
            `torch.Tensor`: share of this call in the unperturbed loss of the step, shape `()`. Over the calls of a
            step the shares add up to the loss at w, estimated from the ascent micro-batches if they are not all.
        """
        self._window.append(_MicroBatch(forward_backward, inputs))
        if len(self._window) == 1:
            backend.begin_step()
        weight = micro_batches / ascent_micro_batches
        ascend_all = ascent_micro_batches >= micro_batches
        if not self._accelerator.sync_gradients:
            if ascend_all or len(self._window) < ascent_micro_batches:
                return self._ascend(self._window[-1], backend) * weight
            return torch.zeros((), device=self._accelerator.device)
        try:
            # A window that ended early has its last micro-batch before the k-th.
            pivot = self._window[-1 if ascend_all else min(ascent_micro_batches, len(self._window)) - 1]
            with backend.ascent_pass():
                clean = self._ascend(pivot, backend) * weight
            end_of_ascent = RandomState.capture(backend.devices)
            self._descend(backend, rho, step, weight, end_of_ascent)
        finally:
            self._window = []
        return clean

    def _ascend(self, micro_batch: _MicroBatch, backend: Backend) -> torch.Tensor:
        micro_batch.random_state = RandomState.capture(backend.devices)
        with self._buffers.observed(backend.model):
            # The host's step may take keys out of the inputs, which the second pass needs again.
            loss = micro_batch.forward_backward(copy.copy(micro_batch.inputs))
        # A CUDA graph would overwrite its output in the second pass.
        micro_batch.loss = loss.clone()
        return micro_batch.loss

    def _descend(self, backend, rho, step, weight, end_of_ascent) -> None:
        window = self._window
        replayed = [micro_batch for micro_batch in window if micro_batch.loss is not None]
        scale = weight / backend.loss_scale()
        try:
            with backend.descent_pass():
                perturbation = backend.perturb(rho, step=step, measure=self._metrics.wants_kept)
                perturbed = sum(
                    self._replay(backend, micro_batch, last=micro_batch is window[-1]) for micro_batch in replayed
                )
                end_of_ascent.restore()
                for micro_batch in window[len(replayed) :]:
                    self._compute(backend, micro_batch, last=micro_batch is window[-1])
        except BaseException:
            # Whoever catches this finds the weights of before the step and no half of a gradient.
            try:
                backend.restore(after_error=True)
            finally:
                backend.clear_gradients()
            raise
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)
        backend.restore()
        clean = sum(micro_batch.loss for micro_batch in replayed)
        self._metrics.update(clean * weight, perturbed * weight, perturbation.norm * scale, perturbation)

    def _replay(self, backend, micro_batch, last) -> torch.Tensor:
        micro_batch.random_state.restore()
        with self._buffers.preserved(backend.model), self._replay_context():
            return self._compute(backend, micro_batch, last).clone()

    def _compute(self, backend, micro_batch, last) -> torch.Tensor:
        self._accelerator.gradient_state._set_sync_gradients(last)
        with backend.micro_batch(last):
            return micro_batch.forward_backward(micro_batch.inputs)
