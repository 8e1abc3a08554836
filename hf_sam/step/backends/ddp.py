"""Features of DistributedDataParallel that affect a SAM step: communication hooks, uneven inputs, static graphs."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..replay.modules import add_module
from ..replay.snapshot import Snapshot
from ..replay.tensors import TensorContents


def check_replicas(models: list[torch.nn.Module], ascent_sync: str) -> None:
    """Check that the DDP models among `models` can run two passes per step.

    Args:
        models (`list[torch.nn.Module]`): the prepared models.
        ascent_sync (`str`): see [`~hf_sam.SAMArguments`].

    Raises:
        ValueError: if a model uses an unsupported feature; the message names the remedy.
    """
    for model in models:
        if not isinstance(model, DistributedDataParallel):
            continue
        if model.static_graph and ascent_sync == "local":
            raise ValueError(
                "sam_ascent_sync='local' computes the ascent gradient without synchronization, but DDP's "
                "static_graph=True does not allow synchronized and unsynchronized passes in turn. Use "
                "sam_ascent_sync='global', or static_graph=False (ddp_static_graph in the training arguments)."
            )
        for _, state in getattr(model, "_comm_hooks", ()):
            if not _can_be_replayed(state):
                raise ValueError(
                    f"SAM cannot restore the state of DDP's communication hook, a {type(state).__name__}, after the "
                    "ascent pass has changed it. Use a hook whose state holds tensors and numbers in attributes or "
                    "containers, or no hook."
                )


def is_in_join_context(model: torch.nn.Module) -> bool:
    """Whether a `Join` context is active, in which ranks without data only mirror the collectives of DDP."""
    return isinstance(model, DistributedDataParallel) and model._join_config.enable


@contextlib.contextmanager
def replayed_hook_states(model: torch.nn.Module) -> Iterator[None]:
    """Context around the ascent pass that restores the states of communication hooks on exit.

    The error feedback of PowerSGD, for example, must come from the last gradient that was applied.
    """
    states = [state for _, state in getattr(model, "_comm_hooks", ()) if not _is_stateless(state)]
    if not states:
        yield
        return
    snapshot = Snapshot(TensorContents(), add_module, copy_everything=True)
    for state in states:
        snapshot.add(state, explicit=True)
    yield
    snapshot.restore()


def _is_stateless(state) -> bool:
    return state is None or isinstance(state, dist.ProcessGroup)


def _can_be_replayed(state) -> bool:
    return _is_stateless(state) or Snapshot(TensorContents(), add_module).add(state, explicit=True)
