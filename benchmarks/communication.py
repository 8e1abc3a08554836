"""Collectives and bytes of a step on each backend, counted, relative to a step of `Trainer`.

    python benchmarks/communication.py

Two processes on the CPU train a small OLMo-2 with two micro-batches per step. The minimum of a step with two passes
follows from the messages of `Trainer`: sharded weights are gathered once more for each micro-batch of the ascent pass,
and its gradient is reduced as that of the descent pass. What SAM adds to it are the norm of the ascent gradient, where
it is sharded, and the metrics.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collectives import SMALL, CollectiveCounter

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
MICRO_BATCHES = 2
STEPS = {
    "Trainer": None,
    "SAM": {"sam_rho": 0.05},
    "SAM, ascent on 1 of 2": {"sam_rho": 0.05, "sam_ascent_micro_batches": 1},
    "SAM, sam_ascent_sync=local": {"sam_rho": 0.05, "sam_ascent_sync": "local"},
    "momentum": {"sam_rho": 0.05, "sam_variant": "momentum"},
    "sam_noise": {"sam_noise": 0.05},
}
PROCESSES = 2


def arguments_of(backend: str) -> dict:
    """Training arguments that select a backend."""
    if backend == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Olmo2DecoderLayer"]}}
    if backend.startswith("zero"):
        config = {
            # As in large models, only the norms stay gathered.
            "zero_optimization": {"stage": int(backend[-1]), "stage3_param_persistence_threshold": 1000},
            "zero_force_ds_cpu_optimizer": False,
            "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
        }
        return {"deepspeed": config}
    return {}


def count(backend: str, steps: dict[str, dict | None]) -> dict[str, list[tuple[str, int]]]:
    """The messages of one step of each kind."""
    import torch
    import transformers
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Olmo2Config, Olmo2ForCausalLM, Trainer, TrainerCallback

    from hf_sam import SAMTrainer, SAMTrainingArguments

    class Counting(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.counter = CollectiveCounter()
            self.counter.__enter__()

        def on_step_end(self, *args, **kwargs):
            self.counter.__exit__(None, None, None)

    transformers.set_seed(0)
    tokens = torch.randint(3, 512, (64, 32))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    found = {}
    for name, sam in steps.items():
        with tempfile.TemporaryDirectory() as folder:
            args = SAMTrainingArguments(
                output_dir=folder,
                max_steps=2,  # the first one also measures `sam/perturbation_kept` and sets up buckets
                per_device_train_batch_size=2,
                gradient_accumulation_steps=MICRO_BATCHES,
                logging_steps=1000,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **arguments_of(backend),
                **(sam or {}),
            )
            if backend == "fsdp2":
                assert args.device.type == "cpu"  # sets up the state
                # Accelerate shards with FSDP2 only where its state names an accelerator.
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            config = Olmo2Config(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=32,
                pad_token_id=0,
            )
            counting = Counting()
            trainer = (Trainer if sam is None else SAMTrainer)(
                model=Olmo2ForCausalLM(config), args=args, train_dataset=rows, callbacks=[counting]
            )
            trainer.train()
            found[name] = counting.counter.messages
    return found


def minimum(backend: str, plain: list[tuple[str, int]], sam: dict | None) -> float:
    """Least bytes of a step of that kind, from the messages of a plain step."""
    gathered = sum(size for name, size in plain if "gather" in name and size > SMALL)
    reduced = sum(size for name, size in plain if "gather" not in name and size > SMALL)
    if sam is None:
        return gathered + reduced
    one_pass = sam.get("sam_variant") == "momentum" or "sam_rho" not in sam
    share = 0 if one_pass else sam.get("sam_ascent_micro_batches", MICRO_BATCHES) / MICRO_BATCHES
    if sam.get("sam_ascent_sync") == "local":
        return reduced
    # ZeRO-1 and 2 gather the weights once after they changed, ZeRO-3 and FSDP2 for each micro-batch. ZeRO-2 and 3
    # reduce the gradients of each micro-batch, the others once.
    gathered *= 1 + (share if backend in ("fsdp2", "zero3") else 1)
    reduced *= 1 + (share if one_pass or backend in ("zero2", "zero3") else 1)
    return gathered + reduced


def work(backend: str, output: str) -> None:
    """Count on one rank; rank 0 writes the result."""
    import torch.distributed as dist

    local = "sam_ascent_sync"
    steps = {name: sam for name, sam in STEPS.items() if backend == "ddp" or local not in (sam or {})}
    found = count(backend, steps)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launch(backend: str) -> dict[str, list]:
    """Count on two processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "messages.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
        command = [sys.executable, *launcher, __file__, "--backends", backend, "--worker", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{backend} failed:\n{done.stderr[-3000:]}")
        return json.loads(output.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--json", help="file for the counted messages")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker:
        work(settings.backends[0], settings.worker)
        return
    found = {backend: launch(backend) for backend in settings.backends}
    print("| backend | step | collectives | MB | bytes / Trainer | minimum | more messages than at the minimum |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for backend, steps in found.items():
        for name, messages in steps.items():
            least = minimum(backend, steps["Trainer"], STEPS[name])
            total, plain = (sum(size for _, size in some) for some in (messages, steps["Trainer"]))
            more = [size for _, size in messages if size <= SMALL]
            before = [size for _, size in steps["Trainer"] if size <= SMALL]
            print(
                f"| {backend} | {name} | {len(messages)} | {total / 1e6:.3f} | {total / plain:.3f} | "
                f"{least / plain:.3f} | {len(more) - len(before):+d} of at most {SMALL} bytes |"
            )
    if settings.json:
        Path(settings.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
