"""What the DeepSpeed ZeRO backends share: driving the engine twice for one optimizer step.

Accelerate's wrapper calls `engine.step()` inside `backward` at the accumulation boundary. The ascent pass needs that
boundary, because there ZeRO reduces and partitions the gradients, but not the step; the descent pass needs the step.
So the engine's `step` is shadowed on the instance while a pass runs, and given back afterwards.

The optimizer's fp32 masters hold w exactly and are never touched by the perturbation; the step starts from them and
rewrites the 16-bit weights, so after a normal step there is nothing to restore and nothing was copied.
"""

import abc
import contextlib
import itertools
import time
from importlib.metadata import version

import torch
import torch.distributed as dist
from accelerate.logging import get_logger

from ..rounding import is_low_precision
from .base import Backend

logger = get_logger(__name__)

_PEER_TIMEOUT_SECONDS = 30.0
# What DeepSpeed counts and keeps on the modules of the user, besides what begins with `ds_`.
_MODULE_ATTRIBUTES = frozenset(
    {"applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn", "_external_params", "_original_parameters"}
)


class ZeroBackend(Backend):
    """Base of the ZeRO backends.

    Raises:
        RuntimeError: if the installed DeepSpeed lacks one of the internal names that a subclass relies on.
    """

    # Names on DeepSpeed's ZeRO optimizer that are not public API; checked once, at the start.
    private_names: tuple[str, ...] = ()

    def __init__(self, accelerator, model, **kwargs):
        self.engine = accelerator.deepspeed_engine_wrapped.engine
        self.optimizer = self.engine.optimizer
        missing = [name for name in self.private_names if not hasattr(self.optimizer, name)]
        if missing or not hasattr(self.engine, "was_step_applied"):
            raise RuntimeError(
                f"hf-sam drives ZeRO stage {self.engine.zero_optimization_stage()} through internals that DeepSpeed "
                f"{version('deepspeed')} does not have on {type(self.optimizer).__name__}: {', '.join(missing)}. "
                "Install a DeepSpeed release that hf-sam is tested with (see its README), or train with FSDP2."
            )
        super().__init__(accelerator, model, **kwargs)
        self._perturbed = False

    def begin_step(self, bystanders=()):
        super().begin_step(bystanders)
        # DeepSpeed keeps the last gradient of a parameter that a backward pass leaves out (an expert, say); in the
        # ascent gradient it would count again.
        self._reset_accumulation()

    def ascent_pass(self):
        return self._shadowed_step(lambda *args, **kwargs: None)  # the boundary without the step

    @contextlib.contextmanager
    def descent_pass(self):
        engine_step = self.engine.step

        def step(*args, **kwargs):
            self._before_engine_step()
            result = engine_step(*args, **kwargs)
            # A skipped step (overflow, the same verdict on all ranks) leaves the perturbed weights in place.
            self._perturbed = not self.engine.was_step_applied()
            return result

        with self._shadowed_step(step):
            yield

    @contextlib.contextmanager
    def _shadowed_step(self, step):
        calls = itertools.count()

        def once(*args, **kwargs):
            if next(calls) > 0:
                raise RuntimeError(
                    "DeepSpeed reached the end of a step twice in one pass of SAM, because it steps inside of each "
                    "backward pass. Add the losses of the micro-batches up before one backward pass, or call the "
                    "SAMStep with each micro-batch under accelerator.accumulate."
                )
            return step(*args, **kwargs)

        self.engine.step = once
        try:
            yield
        finally:
            del self.engine.step

    def is_own_attribute(self, name):
        return name.startswith("ds_") or name in _MODULE_ATTRIBUTES

    def micro_batch(self, last):
        # As in the host's loop: ZeRO takes the boundary from `sync_gradients` and forbids `no_sync`.
        return contextlib.nullcontext()

    @torch.no_grad()
    def _restore(self, after_error):
        if not self._perturbed:
            return
        if after_error and not _all_ranks_arrive():
            logger.error(
                "An error in the descent pass did not reach all ranks, so the perturbed weights of this process could "
                "not be gathered back. Its fp32 master weights are intact; resume from the last checkpoint.",
                main_process_only=False,
            )
            return
        self._put_back()
        self._perturbed = False

    def clear_gradients(self):
        super().clear_gradients()
        self._reset_accumulation()

    def loss_scale(self, scalers):
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else super().loss_scale(scalers)

    def has_coarse_weights(self):
        return is_low_precision(self.optimizer.master_weights_and_grads_dtype)

    def _total(self, fragments, values):
        total = super()._total(fragments, values)
        dist.all_reduce(total, group=self.optimizer.dp_process_group)
        return total

    # What a subclass has to say.

    def _before_engine_step(self) -> None:
        """Last moment before the optimizer reads its masters."""

    @abc.abstractmethod
    def _put_back(self) -> None:
        """Rewrite the weights of all ranks from what holds w exactly; a collective."""

    @abc.abstractmethod
    def _reset_accumulation(self) -> None:
        """Make the optimizer forget the ascent gradients, as its own step would."""


# Counts the errors of this process, so that each has a key of its own in the store, across backends.
_errors = itertools.count()


def _all_ranks_arrive() -> bool:
    """Wait a little for the other ranks without a collective, which would hang if one of them is gone."""
    world = dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    key = f"hf_sam/restore/{next(_errors)}"
    arrived = store.add(key, 1)
    deadline = time.monotonic() + _PEER_TIMEOUT_SECONDS
    while arrived < world and time.monotonic() < deadline:
        time.sleep(0.05)
        arrived = store.add(key, 0)
    return arrived >= world
