"""The passes of one optimizer step over its micro-batches."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .argument_checks import describe
from .backends import Backend
from .loss_scale import record_scalers
from .replay import CapturedState, KeptInputs, LoopState


@dataclass
class MicroBatch:
    """A stored micro-batch.

    Attributes:
        forward_backward (`Callable`): computes its loss and accumulates its gradient.
        inputs (`KeptInputs`): what `forward_backward` is called with.
    """

    forward_backward: Callable[[Any], torch.Tensor]
    inputs: KeptInputs


@dataclass
class Ascent:
    """What the ascent pass leaves for the descent pass.

    Attributes:
        losses (`list[torch.Tensor]`): losses at w of its micro-batches, each of shape `()`.
        states (`list[CapturedState]`): states of the loop before each of its micro-batches.
        end (`CapturedState`): state of the loop after it.
        scalers (`list[torch.amp.GradScaler]`): the scalers that it used.
    """

    losses: list[torch.Tensor]
    states: list[CapturedState]
    end: CapturedState
    scalers: list[torch.amp.GradScaler]


class Passes:
    """Runs passes over micro-batches.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use.
        backend ([`~hf_sam.step.backends.Backend`]): the backend of the model.
        loop_state ([`~hf_sam.step.replay.LoopState`]): captures the states that a pass changes.
        perturbed_context (`Callable[[bool], AbstractContextManager]`): context around each micro-batch of the descent
            pass that follows an ascent pass; the argument is whether the ascent pass had the micro-batch, too.
    """

    def __init__(
        self,
        accelerator,
        backend: Backend,
        loop_state: LoopState,
        perturbed_context: Callable[[bool], contextlib.AbstractContextManager],
    ):
        self._accelerator = accelerator
        self._backend = backend
        self._loop_state = loop_state
        self._perturbed_context = perturbed_context

    def ascent(self, window: list[MicroBatch], k: int) -> Ascent:
        """Accumulate the gradient of the first k micro-batches at w."""
        states, losses = [], []
        with self._backend.ascent_pass(), record_scalers() as scalers:
            for i, micro_batch in enumerate(window[:k]):
                states.append(self._loop_state.capture())
                inputs = micro_batch.inputs.for_ascent(last=i == len(window) - 1)
                losses.append(self._compute(micro_batch, inputs, last=i == k - 1))
        self._loop_state.end_ascent()
        return Ascent(losses, states, self._loop_state.capture(), scalers)

    def descent(self, window: list[MicroBatch], ascent: Ascent) -> list[torch.Tensor]:
        """Accumulate the gradient of all micro-batches at w + e, with the states that the ascent pass had.

        Returns:
            `list[torch.Tensor]`: losses at w + e of the micro-batches of the ascent pass.
        """
        losses, states = [], ascent.states
        for i, micro_batch in enumerate(window):
            last, replayed = i == len(window) - 1, i < len(states)
            if replayed:
                states[i].restore(end=False)
                states[i] = None  # frees its copies
            elif i == len(states):
                ascent.end.restore()
            with self._perturbed_context(replayed):
                loss = self._compute(micro_batch, micro_batch.inputs.for_descent(), last)
            if replayed:
                losses.append(loss)
        return losses

    def single(self, window: list[MicroBatch]) -> list[torch.Tensor]:
        """Accumulate the gradient of all micro-batches as plain training does; returns their losses."""
        losses = []
        for i, micro_batch in enumerate(window):
            last = i == len(window) - 1
            losses.append(self._compute(micro_batch, micro_batch.inputs.for_ascent(last=last), last))
        return losses

    def _compute(self, micro_batch: MicroBatch, inputs, last: bool) -> torch.Tensor:
        self._accelerator.gradient_state._set_sync_gradients(last)
        with self._backend.micro_batch(last):
            loss = micro_batch.forward_backward(inputs)
        if not isinstance(loss, torch.Tensor) or loss.ndim > 0:
            raise TypeError(
                "The function passed to a SAMStep must return the contribution of its micro-batch to the loss, a "
                f"tensor of shape (), but returned {describe(loss)}."
            )
        # Cloned, because a CUDA graph overwrites its output in its next run.
        return loss.detach().clone()
