"""Select the backend for a training set-up, and reject the set-ups that SAM does not support."""

from accelerate.utils import DistributedType

from .base import Backend
from .local import LocalBackend

__all__ = ["Backend", "LocalBackend", "check_supported", "has_own_scheduler", "select_backend"]


def select_backend(accelerator, model, **kwargs) -> Backend:
    """Create the backend for a model that `accelerator` has prepared.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use.
        model (`torch.nn.Module`): the model returned by `accelerator.prepare`.
        kwargs: passed to [`~hf_sam.step.backends.Backend`].

    Raises:
        ValueError: if SAM does not support this set-up; the message names an alternative.
    """
    check_supported(accelerator, ascent_sync=kwargs.get("ascent_sync", "global"))
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return LocalBackend(accelerator, model, **kwargs)
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        from .zero3 import Zero3Backend

        return Zero3Backend(accelerator, model, **kwargs)
    from .zero12 import Zero12Backend

    return Zero12Backend(accelerator, model, **kwargs)


def check_supported(accelerator, ascent_sync: str = "global") -> None:
    """Check that SAM supports this set-up.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator in use; need not have prepared a model yet.
        ascent_sync (`str`, defaults to `"global"`): see [`~hf_sam.SAMArguments`].

    Raises:
        ValueError: if SAM does not support this set-up; the message names an alternative.
    """
    if getattr(accelerator, "has_lomo_optimizer", False):
        raise ValueError(
            "SAM does not support the LOMO optimizers, which update the weights inside the backward pass: there is no "
            "gradient left for the ascent step. Use another optimizer, e.g. torch.optim.AdamW."
        )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)
    elif kind == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                "SAM does not support FSDP1, whose flat parameters hide the shards. Use FSDP2: "
                "`fsdp_config={'version': 2}` in the training arguments or `fsdp_version: 2` in the accelerate config."
            )
    elif kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"SAM does not support accelerate's {kind.value}. Use one device, DDP, FSDP2, or DeepSpeed ZeRO 1 to 3."
        )
    if ascent_sync == "local" and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "sam_ascent_sync='local' needs whole weights and gradients on every rank, but "
            f"{kind.value} shards them. Use sam_ascent_sync='global', or DDP."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("cp", "sp", "tp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(
                f"SAM does not support `{name}_size` > 1 in the parallelism config: the replay of micro-batches that "
                "are split over ranks has not been tested. Use data parallelism (DDP, FSDP2 or ZeRO)."
            )


def has_own_scheduler(accelerator) -> bool:
    """Whether DeepSpeed creates the learning-rate scheduler from its own config."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "scheduler" in plugin.deepspeed_config


def _check_deepspeed(plugin) -> None:
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if plugin.zero_stage == 0:
        raise ValueError("SAM does not support DeepSpeed with ZeRO stage 0. Use stage 1, 2 or 3, or plain DDP.")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise ValueError(f"SAM does not support NVMe {part}: set its device to 'cpu' or 'none'.")
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        raise ValueError("SAM does not support `offload_optimizer.super_offload`: set it to false.")
    for option, off in _ZERO_OPTIONS_OFF.items():
        if zero.get(option, off) not in (off, None):
            raise ValueError(
                f"SAM does not support `zero_optimization.{option}`, which moves weights or gradients to another "
                f"place. Set it to {off!r}."
            )
    if (config.get("compile") or {}).get("deepcompile"):
        raise ValueError("SAM does not support DeepSpeed's DeepCompile. Set `compile.deepcompile` to false.")
    if (config.get("optimizer") or {}).get("type", "").lower() == "muon":
        raise ValueError(
            "SAM does not support Muon in DeepSpeed, which replaces gradients by updates while it reduces them. Use "
            "AdamW, or Muon without DeepSpeed."
        )
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        raise ValueError("SAM does not support DeepSpeed's tensor parallelism. Set `tensor_parallel.autotp_size` to 1.")
    accumulate = str((config.get("data_types") or {}).get("grad_accum_dtype")).removeprefix("torch.")
    bf16 = (config.get("bf16") or {}).get("enabled") in (True, "auto")
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if plugin.zero_stage == 1 and bf16 and not offloaded and accumulate in ("fp32", "float", "float32"):
        raise ValueError(
            "SAM does not support ZeRO stage 1 with bf16 and `data_types.grad_accum_dtype: fp32`, because DeepSpeed "
            "then uses a different optimizer class. Use stage 2, or remove grad_accum_dtype."
        )


# ZeRO options that change where weights or gradients are stored, each with its default.
_ZERO_OPTIONS_OFF = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
    "zenflow": None,
}
