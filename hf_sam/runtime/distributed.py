"""Collectives over the processes of a run, and sharding of batches over them.

Only [`join_processes`] sets up a process group, and only [`leave_processes`] ends it; all other functions use the
existing one. Without Accelerate's state (in a script or a notebook) there is one process.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState

from .errors import MeasurementError

T = TypeVar("T")


def launched_world_size() -> int:
    """Number of processes that the launcher started; known before a process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
    if not PartialState._shared_state:
        return 0, 1
    state = PartialState()
    return state.process_index, state.num_processes


def join_processes() -> None:
    """Set up the process group of the launched processes; without a launcher there is one process.

    Raises:
        RuntimeError: if not all launched processes joined the group.
    """
    launched = launched_world_size()
    if launched > 1 and not torch.accelerator.is_available():
        # By default, accelerate treats CPU processes as separate runs.
        PartialState(cpu=True, backend="gloo")
    else:
        PartialState()
    if launched != rank_and_world()[1]:
        raise RuntimeError(f"{launched} processes were launched, but accelerate sees {rank_and_world()[1]}.")


def leave_processes(failed: bool = False) -> None:
    """Release what native threads still use, before the interpreter of this process ends.

    Args:
        failed (`bool`, defaults to `False`): whether other ranks may still be in a collective. Only a group of Gloo,
            which does not wait for them, is then ended.

    Threads of Gloo and of Arrow that hold Python objects at exit abort the process: "terminate called without an active
    exception", exit status -6, after all the work is done (pytorch/pytorch#190489, apache/arrow#45214).
    """
    gc.collect()  # trainers keep streams in reference cycles
    if torch.distributed.is_initialized() and not (failed and torch.distributed.get_backend() != "gloo"):
        torch.distributed.destroy_process_group()


def default_device() -> torch.device:
    """The device of this process."""
    if PartialState._shared_state:
        return PartialState().device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def shard(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Shard batches over the ranks; yields the batches of this rank, each with whether it counts.

    All ranks get the same number of batches, because sharded models communicate in every forward pass. A rank without
    a batch in the last round repeats the batch of another rank, which does not count.
    """
    rank, world = rank_and_world()
    if world > 1:
        _check_data_parallel()
    batches = iter(batches)
    while one_each := list(islice(batches, world)):
        counts = rank < len(one_each)
        yield one_each[rank if counts else 0], counts


def _check_data_parallel() -> None:
    """Raises ValueError under tensor, context or sequence parallelism, where ranks must share their batches."""
    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    for name in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(
                f"The instruments shard batches over processes, which does not work with `{name}_size` > 1. Save the "
                "model and measure it with `hf-sam evaluate`."
            )


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, on the device of `value`; may overwrite `value`."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import reduce

    return reduce(value, reduction="sum")


def all_reduce_sum_array(values: np.ndarray) -> np.ndarray:
    """Elementwise sum of a NumPy array over all processes, in the precision of `values`."""
    if rank_and_world()[1] == 1:
        return values
    return all_reduce_sum(torch.from_numpy(values).to(PartialState().device)).cpu().numpy()


def all_reduce_max(value: int) -> int:
    """Largest value over all processes."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import gather_object

    return max(gather_object([value]))


def broadcast(value: T) -> T:
    """Return the value of rank 0 on all ranks."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def wait_for_everyone() -> None:
    """Wait until all ranks are here, e.g. before a process ends whose launcher would then end the others."""
    if rank_and_world()[1] > 1:
        PartialState().wait_for_everyone()


def compute_on_first(compute: Callable[[], T]) -> T:
    """Call `compute` on rank 0 and return its result on all ranks.

    A ValueError, OSError or MeasurementError of rank 0 is raised on all ranks; otherwise they would wait for rank 0
    forever.
    """
    value, problem = None, None
    if rank_and_world()[0] == 0:
        try:
            value = compute()
        except (ValueError, OSError, MeasurementError) as error:
            problem = error
    value, problem = broadcast((value, problem))
    if problem is not None:
        raise problem
    return value
