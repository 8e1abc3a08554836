"""What DistributedDataParallel adds to a model: communication hooks with a state, uneven inputs, static graphs."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..replay.modules import add_tree
from ..replay.snapshot import Snapshot
from ..replay.tensors import TensorContents


def check_replicas(models: list[torch.nn.Module], ascent_sync: str) -> None:
    """Refuse what DDP cannot do in two passes.

    Args:
        models (`list[torch.nn.Module]`): the prepared models.
        ascent_sync (`str`): see [`~hf_sam.SAMArguments`].

    Raises:
        ValueError: with the remedy.
    """
    for model in models:
        if not isinstance(model, DistributedDataParallel):
            continue
        if model.static_graph and ascent_sync == "local":
            raise ValueError(
                "sam_ascent_sync='local' computes the ascent gradient without synchronization, for which DDP's "
                "static_graph=True leaves no choice between steps. Use sam_ascent_sync='global', or "
                "static_graph=False (ddp_static_graph in the training arguments)."
            )
        for _, state in getattr(model, "_comm_hooks", ()):
            if not _can_be_replayed(state):
                raise ValueError(
                    f"SAM cannot put back the state of DDP's communication hook, a {type(state).__name__}, which the "
                    "ascent gradient would change. Use a hook whose state holds tensors and numbers in attributes or "
                    "containers, or none."
                )


def joins_uneven_inputs(model: torch.nn.Module) -> bool:
    """Whether a `Join` context is in force, in which ranks that ran out of data follow the collectives of DDP only."""
    return isinstance(model, DistributedDataParallel) and model._join_config.enable


@contextlib.contextmanager
def replayed_hook_states(model: torch.nn.Module) -> Iterator[None]:
    """Around the ascent pass: communication hooks forget what it taught them.

    The error feedback of PowerSGD, say, is what the last gradient that was applied has left out.
    """
    states = [state for _, state in getattr(model, "_comm_hooks", ()) if not _is_stateless(state)]
    if not states:
        yield
        return
    snapshot = Snapshot(TensorContents(), add_tree, copy_everything=True)
    for state in states:
        snapshot.add(state, named=True)
    yield
    snapshot.restore()


def _is_stateless(state) -> bool:
    return state is None or isinstance(state, dist.ProcessGroup)


def _can_be_replayed(state) -> bool:
    return _is_stateless(state) or Snapshot(TensorContents(), add_tree).add(state, named=True)
