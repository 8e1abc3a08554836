"""What a run will take, told without running it: tokens, steps, memory of each device, time; with SAM and without.

Memory of weights and optimizer is counted; that of activations is taken from a forward pass of the real model over
tensors without content, as what autograd keeps for the backward pass.
"""

import math
from dataclasses import dataclass

import torch

# Dense bf16 peak in FLOP/s, from the vendor's data sheets, and the share of it that such runs reach.
DEVICES = {"A100": 312e12, "H100": 989e12}
UTILIZATION = 0.4

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class ModelSize:
    """Sizes that memory and time follow from.

    Attributes:
        parameters (`int`): all of them.
        trainable (`int`): those that have a gradient.
        multiplied (`int`): those that each token is multiplied with: all but input embeddings that are not tied.
        largest_unit (`int`): parameters of the largest block, or of all outside of blocks, which sharded strategies
            gather as one.
        layers (`int`): number of blocks.
        hidden (`int`): width.
        vocabulary (`int`): number of tokens.
        activations (`int`): bytes that autograd keeps of one micro-batch, of fp32 weights under autocast.
        activations_16 (`int`): of bf16 weights, as sharded strategies and ZeRO have them.
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
    """Sizes of a model that is never given memory.

    Args:
        make_model (`Callable[[torch.dtype], PreTrainedModel]`): makes it.
        batch (`int`): sequences of a micro-batch.
        length (`int`): tokens of a sequence.
        bf16 (`bool`): whether it runs in bf16.
        gradient_checkpointing (`bool`): whether blocks are computed again in the backward pass.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(torch.float32)
        kept = _kept(model, batch, length, bf16, gradient_checkpointing)
        kept_16 = _kept(make_model(torch.bfloat16), batch, length, False, gradient_checkpointing) if bf16 else kept
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
            activations=kept,
            activations_16=kept_16,
        )


def _kept(model, batch: int, length: int, autocast: bool, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass, without the weights."""
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    own = {param.untyped_storage()._cdata for param in model.parameters()}
    kept: dict[int, tuple[int, object]] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), storage  # held, so that no other gets its address
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(input_ids=ids, labels=ids)
    return sum(size for size, _ in kept.values())


def _blocks(model) -> list[torch.nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def memory(size: ModelSize, strategy: str, devices: int, batch: int, length: int, *, sam: bool) -> dict[str, int]:
    """Bytes on each device, at the peak of a step, by what they hold.

    Weights are kept in fp32, under ZeRO in bf16 with fp32 masters; AdamW keeps two fp32 moments. DDP holds gradients a
    second time, in its buckets; FSDP2 holds those of all weights, in bf16, while micro-batches are accumulated. SAM
    keeps a copy of the trainable weights during its second pass, but under ZeRO, which restores them from the masters.

    Args:
        size ([`ModelSize`]): of the model.
        strategy (`str`): one of `STRATEGIES`.
        devices (`int`): how many share the work.
        batch (`int`): sequences of a micro-batch.
        length (`int`): tokens of a sequence.
        sam (`bool`): whether steps take two passes.

    Returns:
        `dict[str, int]`: bytes of weights, gradients, optimizer, sam, activations and logits.
    """
    whole, trained = size.parameters, size.trainable
    gathered = 2 * 2 * size.largest_unit if devices > 1 else 0  # one in use, the next on its way
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
        "sam": math.ceil(copy) if sam else 0,
        "activations": size.activations if strategy == "ddp" else size.activations_16,
        # The gradient of the logits, in fp32, beside those that are kept.
        "logits": 4 * batch * length * size.vocabulary,
    }


def flops(size: ModelSize, tokens: int, length: int) -> float:
    """Floating-point operations of plain training: 6 for each weight and token, and those of causal attention.

    Without recomputation (gradient checkpointing), as model FLOPs are usually counted (PaLM, arXiv 2204.02311).
    """
    return tokens * (6 * size.multiplied + 6 * size.layers * size.hidden * length)


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        tokens (`int`): to train on.
        steps (`int`): optimizer steps.
        sequences (`int`): of a step.
        length (`int`): tokens of a sequence.
        passes (`float`): passes of SAM's steps for each of plain training: 2 if SAM acts in all of them.
        size ([`ModelSize`]): of the model.
        batch (`int`): sequences of a micro-batch.
        devices (`int`): number of devices.
    """

    tokens: int
    steps: int
    sequences: int
    length: int
    passes: float
    size: ModelSize
    batch: int
    devices: int

    def hours(self, device: str, sam: bool) -> float:
        """Hours on all devices, at `UTILIZATION` of their peak."""
        work = flops(self.size, self.tokens, self.length) * (self.passes if sam else 1)
        return work / (DEVICES[device] * UTILIZATION * self.devices) / 3600

    def text(self) -> str:
        """The plan in words and Markdown tables."""
        from ..runtime.markdown import markdown_table

        size = self.size
        lines = [
            f"{size.parameters:,} parameters, {self.tokens:,} tokens ({self.tokens / size.parameters:.1f} a "
            f"parameter) in {self.steps:,} optimizer steps of {self.sequences} x {self.length} tokens, on "
            f"{self.devices} device{'s' if self.devices > 1 else ''} with micro-batches of {self.batch}.",
            "",
            "Memory of each device in GiB, at the peak of a step:",
            "",
        ]
        rows = []
        for strategy in STRATEGIES:
            with_sam = memory(size, strategy, self.devices, self.batch, self.length, sam=True)
            states = with_sam["weights"] + with_sam["gradients"] + with_sam["optimizer"]
            rest = with_sam["activations"] + with_sam["logits"]
            cells = [states, rest, with_sam["sam"], states + rest, states + rest + with_sam["sam"]]
            rows.append([strategy, *(f"{cell / 2**30:.2f}" for cell in cells)])
        header = ["strategy", "weights, gradients, optimizer", "activations", "copy for SAM", "plain", "with SAM"]
        lines += [markdown_table(header, rows), "", f"Time at {UTILIZATION:.0%} of the peak in bf16:", ""]
        rows = [
            [f"{self.devices} x {device}", *(_duration(self.hours(device, sam)) for sam in (False, True))]
            for device in DEVICES
        ]
        lines.append(markdown_table(["devices", "plain", f"with SAM ({self.passes:.3g} x)"], rows))
        return "\n".join(lines)


def _duration(hours: float) -> str:
    if hours * 60 < 1:
        return "less than a minute"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h"
