"""Batches of held-out data, sharded over processes, and the inputs of a model."""

import inspect
from collections.abc import Iterable, Iterator

import torch

from ..runtime.distributed import rank_and_world, shard
from ..runtime.labels import IGNORE_INDEX
from ..runtime.progress import progress
from .documents import Batch, HeldOutData


def batches_of(data, batch_size: int) -> Iterable[Batch]:
    """Batches of any data that an instrument accepts; they can be iterated over more than once.

    Args:
        data ([`HeldOutData`], `torch.utils.data.DataLoader`, or rows with `input_ids`): see `HeldOutData`. A
            dataloader's batches need `input_ids`, and may have `labels`, `attention_mask`, and, if packed,
            `position_ids` that start again at 0 with every document.
        batch_size (`int`): rows a batch, for data that is not in batches.

    Raises:
        ValueError: for a dataloader that shuffles, or that accelerate prepared, whose ranks repeat rows to get even
            batches.
    """
    if isinstance(data, HeldOutData):
        return data.batches(batch_size)
    if isinstance(data, list) and data and isinstance(data[0], Batch):
        return data
    if isinstance(data, torch.utils.data.DataLoader):
        if type(data).__module__.startswith("accelerate."):
            raise ValueError(
                "A dataloader prepared by accelerate repeats rows where they do not divide evenly, which would count "
                "them twice. Pass the dataloader itself: the instruments shard its batches over the processes."
            )
        stream = isinstance(data.dataset, torch.utils.data.IterableDataset)
        if not stream and type(data.sampler) is not torch.utils.data.SequentialSampler:
            raise ValueError(
                f"A dataloader with a {type(data.sampler).__name__} has its documents in another order each time, or "
                "only a part of them, so that they cannot be compared or sharded over processes. Pass one with "
                "shuffle=False and no sampler: the instruments shard its batches themselves."
            )
        return _LoaderBatches(data)
    return HeldOutData(data).batches(batch_size)


def shared_batches(data, batch_size: int, description: str) -> Iterator[tuple[Batch, bool]]:
    """The batches of this process and whether they count, with a progress bar; see `runtime.distributed.shard`."""
    batches = batches_of(data, batch_size)
    world = rank_and_world()[1]
    try:
        length = -(-len(batches) // world)
    except TypeError:  # a dataloader over a stream
        length = None
    yield from progress(shard(batches), description, length)


class _LoaderBatches:
    """The batches of a dataloader as [`Batch`], with documents numbered in their order."""

    def __init__(self, loader: torch.utils.data.DataLoader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        # A new iterator draws a seed for its workers from the global random stream, which must not change.
        generator = self.loader.generator
        state = (torch.get_rng_state(), None if generator is None else generator.get_state())
        iterator = iter(self.loader)
        torch.set_rng_state(state[0])
        if generator is not None:
            generator.set_state(state[1])
        for inputs in iterator:
            batch = _from_loader(dict(inputs), first=count)
            count = int(batch.documents.max()) + 1
            yield batch


def _from_loader(inputs: dict, first: int) -> Batch:
    if "input_ids" not in inputs:
        raise ValueError(f"Batches of the dataloader need 'input_ids', but have {sorted(inputs)}.")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    labels = inputs.pop("labels", ids).masked_fill(~real, IGNORE_INDEX)
    starts = torch.zeros_like(real)
    starts[torch.arange(len(ids)), real.int().argmax(dim=1)] = True  # also with padding on the left
    if "position_ids" in inputs:
        starts |= (inputs["position_ids"] == 0) & real
        if real.all():
            # transformers separates packed documents by their positions only if there is no mask.
            inputs.pop("attention_mask", None)
    # Numbered over all rows in order; padding belongs to a document, but does not count.
    documents = (starts.flatten().cumsum(0) - 1).reshape(ids.shape).clamp(min=0) + first
    return Batch(inputs=inputs, labels=labels.masked_fill(starts, IGNORE_INDEX), documents=documents)


def model_inputs(model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """The arguments of the forward pass on `device`, with positions that do not depend on the side of the padding."""
    accepted = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.inputs.items()}
    mask = inputs.get("attention_mask")
    if mask is not None and "position_ids" not in inputs and ("position_ids" in accepted or anything):
        inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
