"""Runs everything that the tests ask of one strategy, alone or as a rank under torchrun, and writes the results.

python worker.py single OUT
torchrun --standalone --nproc_per_node 2 worker.py zero2 OUT [NAME ...]
"""

import dataclasses
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState, GradientState
from distributed import counts, measures, scenarios
from distributed.cases import GLOBAL_BATCH, Case, cases_of
from distributed.strategies import allow_fsdp_on_cpu, strategy_arguments
from torch.distributed.fsdp import FSDPModule
from toy import Branches, arguments, olmo2, step_logs, token_dataset

from hf_sam import SAMTrainer, SAMTrainingArguments
from hf_sam.runtime.distributed import leave_processes


def build_trainer(
    strategy: str,
    case: Case,
    output_dir: Path,
    trainer_class=SAMTrainer,
    config_class=SAMTrainingArguments,
    **overrides,
):
    """A trainer of `case` under `strategy`, on data in their given order."""
    # Strategies and precisions differ between cases, and accelerate would keep those of the first one.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "train_sampling_strategy": "sequential",
        "ddp_backend": "gloo" if world > 1 else None,
        **case.arguments,
        **strategy_arguments(strategy, case.offload, case.zero, case.layer),
        **overrides,
    }
    rows = token_dataset(rows=GLOBAL_BATCH * case.accumulation * settings["max_steps"])
    if case.sft:
        return build_sft_trainer(strategy, case, output_dir, rows, settings)
    args = arguments(output_dir / f"{case.name}-run", config_class, **settings)
    allow_fsdp_on_cpu(strategy, args)
    return trainer_class(model=build_model(case), args=args, train_dataset=rows)


def build_sft_trainer(strategy: str, case: Case, output_dir: Path, rows: list[dict], settings: dict):
    """TRL's trainer on the same rows, which its own collator pads."""
    from datasets import Dataset
    from toy_trl import tokenizer

    from hf_sam import SAMSFTConfig, SAMSFTTrainer

    unpadded = [
        {name: row[name][row["attention_mask"].bool()].tolist() for name in ("input_ids", "labels")} for row in rows
    ]
    args = arguments(
        output_dir / f"{case.name}-run",
        SAMSFTConfig,
        **{**settings, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
    )
    allow_fsdp_on_cpu(strategy, args)
    return SAMSFTTrainer(
        model=build_model(case), args=args, train_dataset=Dataset.from_list(unpadded), processing_class=tokenizer()
    )


def config_with(fields: type) -> type:
    """SAM's training arguments with other fields joined to them."""
    return dataclasses.make_dataclass("Config", [], bases=(fields, SAMTrainingArguments))


def build_model(case: Case) -> torch.nn.Module:
    """The model of `case`; LoRA adapters start from non-zero weights, so that all of them have gradients."""
    if case.model == "branches":
        return Branches()
    model = olmo2(dropout=case.dropout)
    if case.model == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def full_weights(trainer) -> dict[str, torch.Tensor] | None:
    """The whole weights on rank 0, as stored."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: value.detach().cpu().clone() for name, value in state.items()} if state else None


def what_ran(accelerator, model) -> dict:
    """Accelerate's name for the strategy, number of modules that FSDP2 shards, ZeRO's stage and offload, precision."""
    wrapper = getattr(accelerator, "deepspeed_engine_wrapped", None)
    kind = accelerator.distributed_type.value
    optimizer = wrapper.engine.optimizer if kind == "DEEPSPEED" else None
    offload = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    return {
        "kind": kind,
        "sharded": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "stage": wrapper.engine.zero_optimization_stage() if optimizer is not None else 0,
        "offload": bool(offload),
        "precision": accelerator.mixed_precision,
    }


def save(trainer, path: Path, **results) -> None:
    """Write results on rank 0."""
    results.setdefault("ran", what_ran(trainer.accelerator, trainer.model_wrapped))
    if trainer.is_world_process_zero():
        torch.save(results, path)


def run(strategy: str, case: Case, output_dir: Path) -> None:
    """Train `case` and save its logs and final weights."""
    trainer = build_trainer(strategy, case, output_dir)
    trainer.train()
    save(
        trainer,
        output_dir / f"{case.name}.pt",
        logs=step_logs(trainer),
        weights=full_weights(trainer),
    )


def main():
    strategy, output_dir, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if not names or "hand_loop" in names:
        # First, because an accelerator without a trainer finds its own settings only in a fresh process.
        scenarios.hand_loop(strategy, Path(output_dir))
    for case in cases_of(strategy):
        if not names or case.name in names:
            run(strategy, case, Path(output_dir))
    for scenario in (*scenarios.ALL, *measures.ALL, counts.counted):
        if not names or scenario.__name__ in names:
            scenario(strategy, Path(output_dir))


if __name__ == "__main__":
    main()
    leave_processes()
