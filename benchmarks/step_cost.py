"""Time and peak memory of a SAM step, relative to a step of `Trainer`.

    python benchmarks/step_cost.py

All variants train the same OLMo-2 model on the same random tokens in one process. They take turns, so that changes in
the speed of the machine affect all of them. Results are medians over the rounds, divided by the median of `Trainer`.
Memory is measured only on an accelerator.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import HfArgumentParser, Olmo2Config, Olmo2ForCausalLM, Trainer, TrainerCallback

from hf_sam import SAMTrainer, SAMTrainingArguments

VARIANTS = {
    "Trainer": None,
    "SAMTrainer, sam_rho=0": {"sam_rho": 0.0},
    "outside of the SAM window": {"sam_rho": 0.05, "sam_start_steps": 10**6},
    "SAM": {"sam_rho": 0.05},
    "SAM, ascent on 1 of 4": {"sam_rho": 0.05, "sam_ascent_micro_batches": 1},
    "SAM, every 2nd step": {"sam_rho": 0.05, "sam_interval": 2},
    "SAM, norms only": {"sam_rho": 0.05, "sam_target_modules": ["norm"]},
    "ASAM": {"sam_rho": 0.5, "sam_variant": "asam"},
}


@dataclass
class BenchmarkArguments:
    """Settings of the benchmark."""

    rounds: int = field(default=7, metadata={"help": "Number of turns of each variant."})
    steps: int = field(default=4, metadata={"help": "Timed optimizer steps per turn, after one warm-up step."})
    hidden_size: int = field(default=256, metadata={"help": "Hidden size of the model."})
    layers: int = field(default=4, metadata={"help": "Number of layers of the model."})
    batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch; a step has 4 micro-batches."})
    length: int = field(default=128, metadata={"help": "Tokens per row."})


class StepTimer(TrainerCallback):
    """Measures the seconds of each optimizer step, without the time between steps."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        _synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def turn(model, rows, sam: dict | None, settings: BenchmarkArguments, output_dir: str) -> tuple[float, float]:
    """Run one turn of a variant; returns seconds per step and peak memory in bytes."""
    timer = StepTimer()
    args = SAMTrainingArguments(
        output_dir=output_dir,
        max_steps=settings.steps + 1 + settings.steps % 2,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=4,
        # No log inside a turn. With `sam_interval`, steps differ, so only their mean over a turn is meaningful.
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(sam or {}),
    )
    trainer = (Trainer if sam is None else SAMTrainer)(model=model, args=args, train_dataset=rows, callbacks=[timer])
    trainer.remove_callback(transformers.PrinterCallback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
    return statistics.mean(timer.seconds[1:]), peak


def main():
    (settings,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    config = Olmo2Config(
        vocab_size=2048,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings.length,
        pad_token_id=0,
    )
    transformers.set_seed(0)
    model = Olmo2ForCausalLM(config)
    tokens = torch.randint(3, config.vocab_size, (64 * settings.batch_size, settings.length))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    seconds = {name: [] for name in VARIANTS}
    peaks = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as output_dir:
        for _ in range(settings.rounds):
            for name, sam in VARIANTS.items():
                took, peak = turn(model, rows, sam, settings, output_dir)
                seconds[name].append(took)
                peaks[name].append(peak)
    plain_seconds, plain_peak = statistics.median(seconds["Trainer"]), statistics.median(peaks["Trainer"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(param.numel() for param in model.parameters())
    print(f"{parameters:,} parameters, {device}, torch {torch.__version__}; Trainer: {plain_seconds:.3f} s per step\n")
    print("| step | time | peak memory |\n| --- | --- | --- |")
    for name in VARIANTS:
        time_ratio = statistics.median(seconds[name]) / plain_seconds
        memory_ratio = statistics.median(peaks[name]) / plain_peak
        memory = f"{memory_ratio:.2f}" if memory_ratio == memory_ratio else "not measured on a CPU"
        print(f"| {name} | {time_ratio:.2f} | {memory} |")


if __name__ == "__main__":
    main()
