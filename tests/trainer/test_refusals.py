"""What cannot be done right is refused at construction, with the remedy in the message."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from toy import arguments, olmo2, step_logs, token_dataset, trainer
from transformers import Trainer, TrainingArguments

from hf_sam import SAMMixin, SAMStep, SAMTrainer
from hf_sam.step.backends import check_supported


def accelerator(kind, **state):
    """As much of an accelerator as the check looks at, around accelerate's own plugins."""
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**state), parallelism_config=None)


def deepspeed(stage=2, zero=None, **config):
    settings = {
        "zero_optimization": {"stage": stage, **(zero or {})},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        **config,
    }
    return accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: deepspeed(stage=0), "stage 1, 2 or 3, or plain DDP"),
        (lambda: deepspeed(3, {"offload_optimizer": {"device": "nvme", "nvme_path": "x"}}), "'cpu' or 'none'"),
        (lambda: deepspeed(3, {"offload_param": {"device": "nvme", "nvme_path": "x"}}), "'cpu' or 'none'"),
        (lambda: deepspeed(3, {"zero_hpz_partition_size": 4}), "zero_hpz_partition_size"),
        (lambda: deepspeed(3, {"zero_quantized_weights": True}), "zero_quantized_weights"),
        (lambda: deepspeed(2, {"zenflow": {"topk_ratio": 0.1}}), "zenflow"),
        (lambda: deepspeed(3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}), "super_offload"),
        (lambda: deepspeed(2, optimizer={"type": "Muon", "params": {}}), "Use AdamW"),
        (lambda: deepspeed(2, tensor_parallel={"autotp_size": 2}), "autotp_size"),
        (lambda: deepspeed(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "float"}), "Use stage 2"),
        (lambda: deepspeed(3, compile={"deepcompile": True}), "deepcompile"),
        (lambda: deepspeed(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}), "Use stage 2"),
        (lambda: accelerator(DistributedType.MEGATRON_LM), "DDP, FSDP2, or DeepSpeed"),
        (
            lambda: accelerator(DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1)),
            "Use FSDP2",
        ),
    ],
)
def test_set_up_without_backend_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        check_supported(refused())


@pytest.mark.parametrize(
    "supported",
    [
        lambda: deepspeed(1),
        lambda: deepspeed(2, {"offload_optimizer": {"device": "cpu"}}),
        lambda: deepspeed(3, {"offload_param": {"device": "cpu"}, "zero_quantized_weights": False}),
        lambda: deepspeed(3, {"offload_param": {"device": "none"}, "zero_hpz_partition_size": 1}),
        lambda: deepspeed(2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
        lambda: deepspeed(
            1, {"offload_optimizer": {"device": "cpu"}}, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}
        ),
        lambda: accelerator(DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)),
        lambda: accelerator(DistributedType.MULTI_GPU),
        lambda: accelerator(DistributedType.MULTI_HPU),
    ],
)
def test_supported_set_up_passes(supported):
    check_supported(supported())


@pytest.mark.parametrize(
    "sharded",
    [
        lambda: deepspeed(2),
        lambda: accelerator(DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)),
    ],
)
def test_local_ascent_needs_whole_weights(sharded):
    with pytest.raises(ValueError, match="sam_ascent_sync='global', or DDP"):
        check_supported(sharded(), ascent_sync="local")


@pytest.mark.parametrize("dimension", ["cp", "sp", "tp"])
def test_splitting_a_micro_batch_over_ranks_is_refused(dimension):
    split = accelerator(DistributedType.MULTI_GPU)
    split.parallelism_config = SimpleNamespace(**{f"{dimension}_enabled": True})
    with pytest.raises(ValueError, match=f"{dimension}_size"):
        check_supported(split)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"{optim}.*adamw_torch"):
        trainer(tmp_path, sam_rho=0.05, optim=optim)
    trainer(tmp_path, sam_rho=0.0, optim=optim)  # nothing of SAM's business


def test_arguments_without_sam_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SAMTrainer needs.*TrainingArguments.*SAMTrainingArguments"):
        SAMTrainer(model=olmo2(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_a_pattern_without_match_is_reported_at_construction(tmp_path):
    with pytest.raises(ValueError, match="sam_target_modules: 'q_prj'"):
        trainer(tmp_path, sam_rho=0.05, sam_target_modules=["q_prj"])


@pytest.mark.parametrize("method", ["_prepare_inputs", "_generate", "generate_on_policy_outputs"])
def test_trainers_that_generate_their_data_are_refused(tmp_path, method):
    # As TRL's GRPO, RLOO and GKD trainers look to the check; they need more than a toy to be constructed.
    base = type("OnPolicyTrainer", (Trainer,), {method: lambda self, inputs: inputs, "__module__": "trl.trainer.some"})
    on_policy = type("SAMOnPolicyTrainer", (SAMMixin, base), {})
    with pytest.raises(ValueError, match="generates its training data"):
        trainer(tmp_path, trainer_class=on_policy, sam_rho=0.05)
    trainer(tmp_path, trainer_class=on_policy, sam_rho=0.0)


def test_mixin_behind_a_trainer_is_refused():
    with pytest.raises(TypeError, match=r"class Wrong\(SAMMixin, \.\.\.\)"):

        class Wrong(Trainer, SAMMixin):
            pass

    class Right(SAMMixin, Trainer):
        pass

    assert issubclass(Right, SAMMixin)


@pytest.mark.parametrize(
    ("late", "message"),
    [
        ({"sam_rho": -1.0}, "sam_rho"),
        ({"sam_phase": "anneal"}, "set anneal_steps"),
        ({"sam_rho": 0.1, "optim": "lomo"}, "adamw_torch"),
    ],
)
def test_arguments_set_after_construction_are_checked_before_the_first_step(tmp_path, late, message):
    run = trainer(tmp_path)
    for name, value in late.items():
        setattr(run.args, name, value)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_annealing_may_be_set_after_construction(tmp_path):
    run = trainer(tmp_path, lr_scheduler_type="linear", max_steps=4)
    run.args.anneal_steps = 2
    run.train()
    rates = [entry["learning_rate"] / run.args.learning_rate for entry in step_logs(run)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_nothing_to_train_is_reported_at_construction(tmp_path):
    model = olmo2().requires_grad_(False)
    with pytest.raises(ValueError, match="Unfreeze"):
        SAMTrainer(model=model, args=arguments(tmp_path, sam_rho=0.05), train_dataset=token_dataset(rows=4))


def test_a_model_trained_in_eight_bits_is_refused(tmp_path):
    model = torch.nn.Linear(4, 4)
    model.weight = torch.nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"'weight'.*float8_e4m3fn.*train adapters"):
        SAMStep(Accelerator(cpu=True), model, rho=0.05)


def test_lomo_is_refused_in_a_loop_of_the_user():
    # Accelerate sets this when it prepares such an optimizer, which needs a package of its own.
    lomo = accelerator(DistributedType.NO)
    lomo.has_lomo_optimizer = True
    with pytest.raises(ValueError, match=r"LOMO.*AdamW"):
        check_supported(lomo)
