"""Common base of the DeepSpeed ZeRO backends: two passes of the engine per optimizer step.

Accelerate's wrapper calls `engine.step()` inside `backward` at the accumulation boundary. ZeRO reduces and partitions
the gradients at this boundary, so the ascent pass needs the boundary but not the step; the descent pass needs both.
Therefore `engine.step` is overridden on the instance during each pass.

The perturbation never touches the optimizer's fp32 masters, which hold w exactly. The optimizer step updates the
masters and rewrites the 16-bit weights from them, so a normal step needs neither a copy nor a restore.
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
# Attributes that DeepSpeed sets on modules, in addition to those that start with `ds_`.
_MODULE_ATTRIBUTES = frozenset(
    {"applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn", "_external_params", "_original_parameters"}
)


class ZeroBackend(Backend):
    """Base class of the ZeRO backends.

    Raises:
        RuntimeError: if the installed DeepSpeed lacks an internal attribute that a subclass uses.
    """

    # Attributes of DeepSpeed's ZeRO optimizer that are not public API; checked at construction.
    private_names: tuple[str, ...] = ()

    def __init__(self, accelerator, model, **kwargs):
        self.engine = accelerator.deepspeed_engine_wrapped.engine
        self.optimizer = self.engine.optimizer
        missing = [name for name in self.private_names if not hasattr(self.optimizer, name)]
        if missing or not hasattr(self.engine, "was_step_applied"):
            raise RuntimeError(
                f"For ZeRO stage {self.engine.zero_optimization_stage()}, hf-sam uses internal attributes of "
                f"{type(self.optimizer).__name__} that DeepSpeed {version('deepspeed')} does not have: "
                f"{', '.join(missing)}. Install a DeepSpeed release that hf-sam is tested with (see its README), or "
                "train with FSDP2."
            )
        super().__init__(accelerator, model, **kwargs)
        self._perturbed = False

    def begin_step(self, bystanders=()):
        super().begin_step(bystanders)
        # DeepSpeed keeps the previous gradient of a parameter that a backward pass does not reach (e.g. an unused
        # expert). It must not become part of the ascent gradient.
        self._reset_accumulation()

    def ascent_pass(self):
        return self._overridden_step(lambda *args, **kwargs: None)  # the boundary without the step

    @contextlib.contextmanager
    def descent_pass(self):
        engine_step = self.engine.step

        def step(*args, **kwargs):
            self._before_engine_step()
            result = engine_step(*args, **kwargs)
            # A step that is skipped because of an overflow (on all ranks alike) leaves the perturbed weights in place.
            self._perturbed = not self.engine.was_step_applied()
            return result

        with self._overridden_step(step):
            yield

    @contextlib.contextmanager
    def _overridden_step(self, step):
        calls = itertools.count()

        def once(*args, **kwargs):
            if next(calls) > 0:
                raise RuntimeError(
                    "DeepSpeed reached the end of a step twice in one pass of SAM, because it steps inside each "
                    "backward pass. Sum the losses of the micro-batches and call backward once, or call the SAMStep "
                    "for each micro-batch under accelerator.accumulate."
                )
            return step(*args, **kwargs)

        self.engine.step = once
        try:
            yield
        finally:
            del self.engine.step

    def is_engine_attribute(self, name):
        return name.startswith("ds_") or name in _MODULE_ATTRIBUTES

    def micro_batch(self, last):
        # As in `Trainer`: ZeRO takes the boundary from `sync_gradients` and forbids `no_sync`.
        return contextlib.nullcontext()

    @torch.no_grad()
    def _restore(self, after_error):
        if not self._perturbed:
            return
        if after_error and not _all_ranks_arrive():
            logger.error(
                "An error in the descent pass did not reach all ranks, so this process could not restore its perturbed "
                "weights with a collective. The fp32 master weights are intact. Resume from the last checkpoint.",
                main_process_only=False,
            )
            return
        self._rewrite_weights()
        self._perturbed = False

    def clear_gradients(self):
        super().clear_gradients()
        self._reset_accumulation()

    def loss_scale(self, scalers):
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else super().loss_scale(scalers)

    def has_low_precision_weights(self):
        return is_low_precision(self.optimizer.master_weights_and_grads_dtype)

    def _sum_over_ranks(self, fragments, values):
        total = super()._sum_over_ranks(fragments, values)
        dist.all_reduce(total, group=self.optimizer.dp_process_group)
        return total

    # Interface of a subclass.

    def _before_engine_step(self) -> None:
        """Called before the optimizer reads its masters."""

    @abc.abstractmethod
    def _rewrite_weights(self) -> None:
        """Rewrite the weights of all ranks from the exact copies of w; a collective."""

    @abc.abstractmethod
    def _reset_accumulation(self) -> None:
        """Clear the ascent gradients in the optimizer, as its own step does."""


# Counts the errors of this process, so that each error has its own key in the store.
_errors = itertools.count()


def _all_ranks_arrive() -> bool:
    """Wait for the other ranks with a timeout. A collective would hang if a rank is missing."""
    world = dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    key = f"hf_sam/restore/{next(_errors)}"
    arrived = store.add(key, 1)
    deadline = time.monotonic() + _PEER_TIMEOUT_SECONDS
    while arrived < world and time.monotonic() < deadline:
        time.sleep(0.05)
        arrived = store.add(key, 0)
    return arrived >= world
