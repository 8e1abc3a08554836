"""Plan a run without running it: tokens, steps, memory per device and time, with and without SAM.

The memory of weights and optimizer states is calculated. The memory of activations is measured as what autograd saves
in a forward pass of the model with fake tensors.
"""

import math
from dataclasses import dataclass

import torch

# Dense bf16 peak in FLOP/s, from the data sheets of the vendor, and the model FLOPs utilization of such runs.
DEVICES = {"A100": 312e12, "H100": 989e12}
UTILIZATION = 0.4

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class ModelSize:
    """Sizes that determine memory and time.

    Attributes:
        parameters (`int`): number of parameters.
        trainable (`int`): number of trainable parameters.
        multiplied (`int`): number of parameters in matrix multiplications: all but untied input embeddings.
        largest_unit (`int`): parameters that sharded strategies gather at once: the largest block, or everything
            outside of the blocks.
        layers (`int`): number of blocks.
        hidden (`int`): hidden size.
        vocabulary (`int`): vocabulary size.
        activations (`int`): bytes that autograd saves for one micro-batch, with fp32 weights under autocast.
        activations_16 (`int`): bytes that autograd saves with bf16 weights, as in sharded strategies and ZeRO.
    """

    parameters: int
    trainable: int
    multiplied: int
    largest_unit: int
    layers: int
    hidden: int
    vocabulary: int
    activations: int
    activations_16: int


def measure_model(
    make_model, batch: int, length: int, *, bf16: bool = True, gradient_checkpointing: bool = False
) -> ModelSize:
    """Measure the sizes of a model without allocating memory for it.

    Args:
        make_model (`Callable[[torch.dtype], PreTrainedModel]`): creates the model.
        batch (`int`): sequences per micro-batch.
        length (`int`): tokens per sequence.
        bf16 (`bool`): whether training runs in bf16.
        gradient_checkpointing (`bool`): whether blocks are recomputed in the backward pass.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(torch.float32)
        saved = saved_16 = _saved_bytes(model, batch, length, bf16, gradient_checkpointing)
        if bf16:
            saved_16 = _saved_bytes(make_model(torch.bfloat16), batch, length, False, gradient_checkpointing)
        config = model.config.get_text_config()
        blocks = [sum(p.numel() for p in layer.parameters()) for layer in _blocks(model)]
        parameters = sum(param.numel() for param in model.parameters())
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
        return ModelSize(
            parameters=parameters,
            trainable=sum(param.numel() for param in model.parameters() if param.requires_grad),
            multiplied=parameters - (0 if tied else embedding.numel()),
            largest_unit=max(max(blocks, default=0), parameters - sum(blocks)),
            layers=len(blocks),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            activations=saved,
            activations_16=saved_16,
        )


def _saved_bytes(model, batch: int, length: int, autocast: bool, gradient_checkpointing: bool) -> int:
    """Bytes that autograd saves for the backward pass, without the weights."""
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    own = {param.untyped_storage()._cdata for param in model.parameters()}
    saved: dict[int, tuple[int, object]] = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes(), storage  # the reference keeps the address unique
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        model(input_ids=ids, labels=ids)
    return sum(size for size, _ in saved.values())


def _blocks(model) -> list[torch.nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def memory(
    size: ModelSize, strategy: str, devices: int, batch: int, length: int, *, sam: bool, average: bool = False
) -> dict[str, int]:
    """Peak memory of a step on each device, in bytes, by category.

    Weights are in fp32, under ZeRO in bf16 with fp32 masters; AdamW has two fp32 moments. DDP has a second copy of the
    gradients in its buckets. FSDP2 has unsharded bf16 gradients during gradient accumulation. SAM has a copy of the
    trainable weights during the descent pass, except under ZeRO, which restores them from the masters.

    Args:
        size ([`ModelSize`]): sizes of the model.
        strategy (`str`): one of `STRATEGIES`.
        devices (`int`): number of devices.
        batch (`int`): sequences per micro-batch.
        length (`int`): tokens per sequence.
        sam (`bool`): whether steps run two passes.
        average (`bool`): whether a moving average of the trained weights is kept in fp32. Not under ZeRO.

    Returns:
        `dict[str, int]`: bytes of `weights`, `gradients`, `optimizer`, `average`, `sam`, `activations` and `logits`.
    """
    whole, trained = size.parameters, size.trainable
    gathered = 2 * 2 * size.largest_unit if devices > 1 else 0  # one unit in use, the next one prefetched, in bf16
    weights, gradients, optimizer, copy = {
        "ddp": (4 * whole, (8 if devices > 1 else 4) * trained, 8 * trained, 4 * trained),
        "fsdp2": (
            4 * whole / devices + gathered,
            4 * trained / devices + (2 * trained if devices > 1 else 0),
            8 * trained / devices,
            4 * trained / devices,
        ),
        # ZeRO shards the masters and the moments from stage 1 on.
        "zero2": (2 * whole, 2 * trained / devices, 12 * trained / devices, 0),
        "zero3": (2 * whole / devices + gathered, 2 * trained / devices, 12 * trained / devices, 0),
    }[strategy]
    return {
        "weights": math.ceil(weights),
        "gradients": math.ceil(gradients),
        "optimizer": math.ceil(optimizer),
        "average": math.ceil(4 * trained / (devices if strategy == "fsdp2" else 1)) if average else 0,
        "sam": math.ceil(copy) if sam else 0,
        "activations": size.activations if strategy == "ddp" else size.activations_16,
        # The fp32 gradient of the logits, in addition to the saved logits.
        "logits": 4 * batch * length * size.vocabulary,
    }


def flops(size: ModelSize, tokens: int, length: int) -> float:
    """Floating-point operations of plain training: 6 per parameter and token, plus causal attention.

    These are model FLOPs, without recomputation in gradient checkpointing (PaLM, arXiv 2204.02311).
    """
    return tokens * (6 * size.multiplied + 6 * size.layers * size.hidden * length)


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        tokens (`int`): number of training tokens.
        steps (`int`): number of optimizer steps.
        sequences (`int`): sequences per optimizer step.
        length (`int`): tokens per sequence.
        passes (`float`): average number of passes per optimizer step with SAM; 2 if SAM acts in all steps.
        size ([`ModelSize`]): sizes of the model.
        batch (`int`): sequences per micro-batch.
        devices (`int`): number of devices.
        average (`bool`): whether a moving average of the weights is kept, which excludes ZeRO.
    """

    tokens: int
    steps: int
    sequences: int
    length: int
    passes: float
    size: ModelSize
    batch: int
    devices: int
    average: bool = False

    def hours(self, device: str, sam: bool) -> float:
        """Duration in hours, at `UTILIZATION` of the peak FLOP/s of all devices."""
        work = flops(self.size, self.tokens, self.length) * (self.passes if sam else 1)
        return work / (DEVICES[device] * UTILIZATION * self.devices) / 3600

    def text(self) -> str:
        """The plan as text with Markdown tables."""
        from ..runtime.markdown import markdown_table

        size = self.size
        lines = [
            f"{size.parameters:,} parameters, {self.tokens:,} tokens ({self.tokens / size.parameters:.1f} per "
            f"parameter) in {self.steps:,} optimizer steps of {self.sequences} x {self.length} tokens, on "
            f"{self.devices} device{'s' if self.devices > 1 else ''} with micro-batches of {self.batch}.",
            "",
            "Peak memory per device in GiB:",
            "",
        ]
        rows = []
        for strategy in STRATEGIES:
            if self.average and strategy.startswith("zero"):
                continue
            with_sam = memory(size, strategy, self.devices, self.batch, self.length, sam=True, average=self.average)
            states = sum(with_sam[part] for part in ("weights", "gradients", "optimizer", "average"))
            rest = with_sam["activations"] + with_sam["logits"]
            cells = [states, rest, with_sam["sam"], states + rest, states + rest + with_sam["sam"]]
            rows.append([strategy, *(f"{cell / 2**30:.2f}" for cell in cells)])
        states = "weights, gradients, optimizer" + (", average" if self.average else "")
        header = ["strategy", states, "activations", "copy for SAM", "plain", "with SAM"]
        lines += [markdown_table(header, rows), "", f"Time at {UTILIZATION:.0%} of the peak in bf16:", ""]
        rows = [
            [f"{self.devices} x {device}", *(duration(self.hours(device, sam)) for sam in (False, True))]
            for device in DEVICES
        ]
        lines.append(markdown_table(["devices", "plain", f"with SAM ({self.passes:.3g} x)"], rows))
        return "\n".join(lines)


def duration(hours: float) -> str:
    """A time for a table."""
    if hours * 60 < 1:
        return "less than a minute"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h"
