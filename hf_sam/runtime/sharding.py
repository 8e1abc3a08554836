"""Access to sharded weights and gradients: the local shard, the compute precision, and the setups without access."""

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_uncompressed(value) -> bool:
    """Whether `value` is a tensor or a shard that holds its numbers as they are; subclasses may compress them."""
    return type(value) in (torch.Tensor, torch.nn.Parameter, DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of `tensor` on this rank, a view of its storage; `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on all ranks, which must all call it; `tensor` itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The part of `whole` that corresponds to this rank's shard of `param`; both have the same global shape."""
    if not isinstance(param, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def flat_offset(param: torch.Tensor) -> int | None:
    """Position of the first element of this rank's shard in the flat parameter; None for shards that are not rows."""
    if not isinstance(param, DTensor):
        return 0
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(shape[1:]) != tuple(param.shape[1:]):
        return None
    return offset[0] * (param.numel() // max(1, param.shape[0])) if shape else 0


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 shards any of the weights."""
    return any(isinstance(param, DTensor) for param in model.parameters())


def check_not_zero3(params: dict[str, torch.Tensor], what: str) -> None:
    """Raises ValueError for weights that ZeRO-3 partitions: only DeepSpeed can change them."""
    if any(hasattr(param, "ds_id") for param in params.values()):
        raise ValueError(
            f"{what} changes the weights, which ZeRO-3 partitions. Save the model and measure it with `hf-sam "
            "evaluate`, or train with FSDP2."
        )


def check_unsharded(params: dict[str, torch.Tensor], what: str) -> None:
    """Raises ValueError unless each process holds the whole weights."""
    check_not_zero3(params, what)
    if any(isinstance(param, DTensor) for param in params.values()):
        raise ValueError(
            f"{what} needs the whole weights on each process, but they are sharded by FSDP2. Save the model and "
            "measure it with `hf-sam evaluate`."
        )


def check_gradients_accessible(accelerator, what: str, optim: str = "") -> None:
    """Check that gradients can be changed between the backward pass and the optimizer step.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use.
        what (`str`): what changes the gradients; subject of the error message.
        optim (`str`, *optional*): name of the optimizer.

    Raises:
        ValueError: under DeepSpeed and FSDP1, and for optimizers that step inside the backward pass.
    """
    in_backward = accelerator.has_lomo_optimizer or "lomo" in optim.lower()
    if in_backward or accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"{what} adds to the gradients after the backward pass, but DeepSpeed and the LOMO optimizers step inside "
            "it. Use DDP or FSDP2 and another optimizer, or set the strength of the penalty to 0."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"{what} does not support FSDP1, whose flat parameters hide the weights. Use FSDP2: "
            "fsdp_config={'version': 2}."
        )


def check_weights_in_model(accelerator, what: str) -> None:
    """Raises ValueError under DeepSpeed, whose optimizer keeps the exact weights; `what` is the subject."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(f"{what} does not work with DeepSpeed, whose optimizer keeps the weights. Use DDP or FSDP2.")


def reshard(model: torch.nn.Module) -> None:
    """Free gathered (unsharded) weights, so that the next forward pass gathers the changed shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compute_dtype(model: torch.nn.Module, param: torch.Tensor) -> torch.dtype:
    """The precision in which the forward pass computes with `param`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            dtype = module._get_fsdp_state()._mp_policy.param_dtype
            if dtype is not None:
                return dtype
    return param.dtype
