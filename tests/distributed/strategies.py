"""How each distributed strategy is asked for in the training arguments."""

from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

WORLD_SIZE = 2

DISTRIBUTED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STRATEGIES = ("single", *DISTRIBUTED)


def strategy_arguments(
    strategy: str, offload: bool = False, zero_options: dict | None = None, layer: str = "Olmo2DecoderLayer"
) -> dict:
    """Training arguments that select `strategy`; `offload` keeps optimizer state (FSDP2: weights) on the CPU."""
    if strategy == "fsdp2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": [layer], "cpu_offload": offload}
        return {"fsdp": True, "fsdp_config": config}
    if strategy.startswith("zero"):
        zero = {
            "stage": int(strategy[-1]),
            # Small enough that some parameters stay gathered and others do not, and that there are many buckets.
            "stage3_param_persistence_threshold": 200,
            "reduce_bucket_size": 5000,
            "stage3_gather_16bit_weights_on_model_save": True,
            **(zero_options or {}),
        }
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
        }
        return {"deepspeed": config}
    return {}


def allow_fsdp_on_cpu(strategy: str, args=None) -> None:
    """Accelerate shards with FSDP2 only where its state names an accelerator; torch does so on the CPU as well."""
    if strategy != "fsdp2":
        return
    if args is not None:
        assert args.device.type == "cpu"  # also sets the state up
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerate_plugins(strategy: str, accumulation: int) -> dict:
    """Arguments of an `Accelerator` that select `strategy`, for loops without a trainer."""
    if strategy in ("single", "ddp"):
        return {"cpu": True}
    # With a plugin, `Accelerator(cpu=True)` would ignore it; the state that it finds already decides the device.
    PartialState(cpu=True, backend="gloo")
    allow_fsdp_on_cpu(strategy)
    if strategy == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Olmo2DecoderLayer"],
            reshard_after_forward=True,
        )
        return {"fsdp_plugin": plugin}
    config = strategy_arguments(strategy)["deepspeed"]
    config["zero_allow_untested_optimizer"] = True
    config["gradient_clipping"] = 0.0
    config["gradient_accumulation_steps"] = accumulation
    config["bf16"] = {"enabled": False}
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
