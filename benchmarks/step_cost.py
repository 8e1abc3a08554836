"""Time and peak memory of a step of each kind, relative to a step of `Trainer`.

    python benchmarks/step_cost.py --sizes 5m 60m --accumulation 1 4
    python benchmarks/step_cost.py --sizes 1b --precisions bf16 --accumulation 4 --batch_size 8 --length 1024  # a GPU

All kinds of steps train the same OLMo-2 on the same random tokens in one process. A turn of `Trainer` stands before and
after each turn of another kind, which is compared with the mean of the two, so that changes in the speed of the machine
cancel. The table has the median of these ratios over the rounds, and their quartiles; "Trainer, again" shows the noise.
Loops without a trainer are compared with the plain loop in the same way.

On a CPU, the C library is told to keep freed memory, as the allocators of accelerators do. By itself it gives memory
back to the system after each step, and the time to get it again would be measured.

Peak memory is measured in a process of its own for each kind: what the allocator of the accelerator held, or on a CPU
the resident memory beyond what the process has before training.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from loops import HandLoop, HandSAM, PytorchOptimizerSAM
from transformers import HfArgumentParser, Olmo2Config, Olmo2ForCausalLM, Trainer, TrainerCallback

from hf_sam import SAMTrainer, SAMTrainingArguments

# Hidden size, layers, vocabulary.
SIZES = {"5m": (192, 6, 4096), "60m": (512, 10, 16384), "1b": (2048, 16, 100352)}
QUARTER = {"sam_rho": 0.05, "sam_ascent_micro_batches": 0.25}
KINDS = {
    "Trainer": None,
    "Trainer, again": None,
    "SAM off, sam_rho=0": {"sam_rho": 0.0},
    "SAM off, outside of its window": {"sam_rho": 0.05, "sam_start_steps": 10**6},
    "sam": {"sam_rho": 0.05},
    "sam, ascent on 1 of 4": QUARTER,
    "sam, every 10th step": {"sam_rho": 0.05, "sam_interval": 10},
    "sam, every 10th step, ascent on 1 of 4": {**QUARTER, "sam_interval": 10},
    "sam, norms only": {"sam_rho": 0.05, "sam_target_modules": ["norm"]},
    "sam, sam_loss_rise": {"sam_loss_rise": 0.01},
    "asam": {"sam_rho": 0.5, "sam_variant": "asam"},
    "momentum": {"sam_rho": 0.05, "sam_variant": "momentum"},
    "sam_noise": {"sam_noise": 0.05},
    "momentum and sam_noise": {"sam_rho": 0.05, "sam_variant": "momentum", "sam_noise": 0.05},
}
LOOPS = {"plain loop": HandLoop, "SAM by hand": HandSAM, "pytorch-optimizer's SAM": PytorchOptimizerSAM}
BASELINES = ("Trainer", "plain loop")


@dataclass
class BenchmarkArguments:
    """Settings of the benchmark."""

    sizes: list[str] = field(default_factory=lambda: ["5m"], metadata={"help": "Models: 5m, 60m, 1b."})
    precisions: list[str] = field(default_factory=lambda: ["fp32"], metadata={"help": "fp32, bf16 (autocast)."})
    accumulation: list[int] = field(default_factory=lambda: [4], metadata={"help": "Micro-batches per step."})
    kinds: list[str] = field(
        default_factory=list, metadata={"help": "Kinds of steps, by name or a part of it; all if none."}
    )
    rounds: int = field(default=7, metadata={"help": "Number of turns of each kind."})
    steps: int = field(default=4, metadata={"help": "Timed steps per turn after one, at least sam_interval."})
    batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch."})
    length: int = field(default=128, metadata={"help": "Tokens per row."})
    memory: bool = field(default=True, metadata={"help": "Also measure peak memory, in processes of their own."})
    json: str | None = field(default=None, metadata={"help": "File for all results."})
    memory_of: str | None = field(default=None, metadata={"help": "Only print the peak memory of this kind of step."})


@dataclass(frozen=True)
class Setting:
    """One table: a model, a precision, and a number of micro-batches."""

    size: str
    precision: str
    accumulation: int

    def __str__(self):
        return f"{self.size}, {self.precision}, {self.accumulation} micro-batches a step"


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


class Bench:
    """A model and tokens, and turns of each kind of step on them."""

    def __init__(self, setting: Setting, arguments: BenchmarkArguments):
        self.setting, self.arguments = setting, arguments
        hidden, layers, vocabulary = SIZES[setting.size]
        config = Olmo2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden if setting.size == "60m" else 3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=arguments.length,
            pad_token_id=0,
        )
        transformers.set_seed(0)
        self.model = Olmo2ForCausalLM(config)
        tokens = torch.randint(3, vocabulary, (64 * arguments.batch_size, arguments.length))
        self.rows = [{"input_ids": row, "labels": row} for row in tokens]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(param.numel() for param in self.model.parameters())

    def turn(self, kind: str, steps: int) -> list[float]:
        """Run steps of a kind; returns the seconds of each."""
        return self._loop_turn(LOOPS[kind], steps) if kind in LOOPS else self._trainer_turn(KINDS[kind], steps)

    def _trainer_turn(self, sam: dict | None, steps: int) -> list[float]:
        timer = StepTimer()
        with tempfile.TemporaryDirectory() as folder:
            args = SAMTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.arguments.batch_size,
                gradient_accumulation_steps=self.setting.accumulation,
                bf16=self.setting.precision == "bf16",
                use_cpu=not torch.accelerator.is_available(),
                logging_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **(sam or {}),
            )
            kind = Trainer if sam is None else SAMTrainer
            trainer = kind(model=self.model, args=args, train_dataset=self.rows, callbacks=[timer])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return timer.seconds

    def _loop_turn(self, kind: type[HandLoop], steps: int) -> list[float]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loop = kind(self.model.train(), device, self.setting.precision == "bf16")
        return loop.run(self._batches(), steps, _synchronize)

    def _batches(self):
        size, rows = self.arguments.batch_size, itertools.cycle(self.rows)
        while True:
            yield [
                {name: torch.stack([row[name] for row in part]) for name in ("input_ids", "labels")}
                for part in (list(itertools.islice(rows, size)) for _ in range(self.setting.accumulation))
            ]


def peak_memory(bench: Bench, kind: str) -> int:
    """Peak bytes of two steps of a kind, beyond the weights."""
    if torch.cuda.is_available():
        bench.turn(kind, 2)
        return torch.cuda.max_memory_allocated()
    before = _resident("VmRSS")
    bench.turn(kind, 3)
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def _memory_in_process(kind: str, setting: Setting, arguments: BenchmarkArguments) -> int:
    flags = ["--memory_of", kind, "--sizes", setting.size, "--precisions", setting.precision]
    flags += ["--accumulation", str(setting.accumulation)]
    flags += ["--batch_size", str(arguments.batch_size), "--length", str(arguments.length)]
    # Freed memory goes back to the system at once, so that the peak is that of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, *flags], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure(setting: Setting, kinds: list[str], arguments: BenchmarkArguments) -> dict[str, dict]:
    """Ratios of time and memory of each kind."""
    bench = Bench(setting, arguments)
    print(f"\n{setting}; {bench.parameters:,} parameters; {_machine()}\n", flush=True)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}

    def take_turn(kind: str) -> float:
        # With `sam_interval`, steps differ, so that only the mean over whole periods has a meaning.
        steps = max(arguments.steps, (KINDS.get(kind) or {}).get("sam_interval", 1))
        seconds[kind].append(statistics.mean(bench.turn(kind, steps + 1)[1:]))
        return seconds[kind][-1]

    for _ in range(arguments.rounds):
        for baseline in BASELINES:
            others = [kind for kind in kinds if baseline_of(kind) == baseline and kind != baseline]
            before = take_turn(baseline) if others else 0.0
            for kind in others:
                mine, after = take_turn(kind), take_turn(baseline)
                ratios[kind].append(2 * mine / (before + after))
                before = after
    found = {}
    for kind in kinds:
        values = ratios[kind] or [1.0]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[kind] = {"seconds": statistics.median(seconds[kind]), "ratio": middle, "quartiles": [low, high]}
        if arguments.memory:
            found[kind]["peak_bytes"] = _memory_in_process(kind, setting, arguments)
    return found


def baseline_of(kind: str) -> str:
    """What a kind of step is compared with."""
    return BASELINES[1] if kind in LOOPS else BASELINES[0]


def table(found: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    lines = ["| step | time | quartiles | seconds | peak memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, result in found.items():
        baseline = found[baseline_of(kind)]
        memory = f"{result['peak_bytes'] / baseline['peak_bytes']:.2f}" if "peak_bytes" in result else "not measured"
        low, high = result["quartiles"]
        lines.append(f"| {kind} | {result['ratio']:.3f} | {low:.3f}-{high:.3f} | {result['seconds']:.3f} | {memory} |")
    return "\n".join(lines)


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def keep_freed_memory() -> None:
    """Start this program again under glibc settings that keep freed memory; they are read at its start only."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
    if not torch.cuda.is_available() and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def main():
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    keep_freed_memory()
    settings = [
        Setting(*each) for each in itertools.product(arguments.sizes, arguments.precisions, arguments.accumulation)
    ]
    if arguments.memory_of:
        print(peak_memory(Bench(settings[0], arguments), arguments.memory_of))
        return
    known = [*KINDS, *LOOPS]
    wanted = {word: [word] if word in known else [kind for kind in known if word in kind] for word in arguments.kinds}
    if unknown := [word for word, found in wanted.items() if not found]:
        raise SystemExit(f"--kinds {unknown[0]}: no kind of step has this in its name; they are {', '.join(known)}.")
    chosen = [kind for found in wanted.values() for kind in found] or known
    kinds = list(dict.fromkeys(["Trainer", *(["plain loop"] if set(chosen) & set(LOOPS) else []), *chosen]))
    results = []
    for setting in settings:
        found = measure(setting, kinds, arguments)
        print(table(found), flush=True)
        results.append({"setting": asdict(setting), "machine": _machine(), "kinds": found})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
