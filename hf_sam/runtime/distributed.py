"""What the measures ask of a run with several processes: who computes which batch, and sums over all of them.

Without Accelerate's state (a script, a notebook) there is one process; a measure never sets up a process group.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Index of this process, and number of processes that share the measuring out between them."""
    if not PartialState._shared_state:
        return 0, 1
    state = PartialState()
    return state.process_index, state.num_processes


def join_processes() -> None:
    """Set up what a launcher started; alone, this is one process.

    Raises:
        RuntimeError: if the launcher started several processes that did not find each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not torch.accelerator.is_available():
        # Left to itself, accelerate takes processes on the CPU for separate runs.
        PartialState(cpu=True, backend="gloo")
    else:
        PartialState()
    if started != rank_and_world()[1]:
        raise RuntimeError(f"{started} processes were started, but accelerate knows of {rank_and_world()[1]}.")


def default_device() -> torch.device:
    """The device of this process."""
    if PartialState._shared_state:
        return PartialState().device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def share(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every world-th batch, and whether it counts.

    All ranks get as many batches, since sharded models communicate in every forward pass; where the last round has
    none for a rank, it computes another rank's batch, and must not count it.
    """
    rank, world = rank_and_world()
    if world > 1:
        _check_data_parallel()
    batches = iter(batches)
    while one_each := list(islice(batches, world)):
        mine = rank < len(one_each)
        yield one_each[rank if mine else 0], mine


def _check_data_parallel() -> None:
    """Raises ValueError where several processes make up one model, and so need the same batches."""
    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    for name in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(
                f"The measures share batches out over processes, which does not work with `{name}_size` > 1. Save the "
                "model and measure it with `hf-sam evaluate`."
            )


def total(values: np.ndarray) -> np.ndarray:
    """Elementwise sum over all processes, in the precision of `values`."""
    if rank_and_world()[1] == 1:
        return values
    return total_tensor(torch.from_numpy(values).to(PartialState().device)).cpu().numpy()


def total_tensor(value: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, on the device of `value`, which may be overwritten."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import reduce

    return reduce(value, reduction="sum")


def largest(value: int) -> int:
    """The largest value of any process."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import gather_object

    return max(gather_object([value]))


def from_first(value: T) -> T:
    """The value of the first process, on all."""
    if rank_and_world()[1] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def checked_by_first(compute: Callable[[], T]) -> T:
    """What the first process computes, on all; a ValueError or an OSError of its is raised on all, too.

    Raised on the first one alone, it would leave the others waiting for that process.
    """
    value, problem = None, None
    if rank_and_world()[0] == 0:
        try:
            value = compute()
        except (ValueError, OSError) as error:
            problem = error
    value, problem = from_first((value, problem))
    if problem is not None:
        raise problem
    return value
