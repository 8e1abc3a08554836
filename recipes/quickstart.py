"""SAM and forgetting on two CPU cores in a few minutes: pretrain, anneal in four ways, fine-tune and quantize each.

    python recipes/quickstart.py

A small OLMo-2 is pretrained on real text at a constant learning rate. From that one checkpoint it is annealed with
AdamW, with SAM, with AdamW over a much shorter anneal, and with AdamW over twice the steps (the passes that SAM takes).
Each result is fine-tuned on math word problems at several learning rates, and quantized to 4-bit NF4. The table shows
what each lost and where it ended; `results.json` and a plot go to --output_dir, and so do all models and the held-out
text, for `hf-sam evaluate`.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Nothing here needs the hub; a machine without network should not wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from datasets import Dataset
from quickstart_data import load_corpus, pack, problem_texts, tokenized, train_tokenizer, without_common_padding
from quickstart_measure import forgetting_there, matched_loss, plot, table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, Olmo2Config, Olmo2ForCausalLM, TrainerCallback

from hf_sam import SAMTrainer, SAMTrainingArguments
from hf_sam.evaluation import held_out_loss, load_quantized

VOCABULARY = 512


@dataclass
class QuickstartArguments:
    """Settings of the quickstart; the defaults take a few minutes on two cores."""

    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where results and models go."})
    seed: int = field(default=42, metadata={"help": "Seed of initialization and data order."})
    sam_rho: float = field(default=0.4, metadata={"help": "Radius of the SAM perturbation."})
    pretrain_steps: int = field(default=1600, metadata={"help": "Optimizer steps at a constant learning rate."})
    anneal_steps: int = field(default=320, metadata={"help": "Optimizer steps of the linear anneal to 0."})
    short_anneal_steps: int = field(default=40, metadata={"help": "Optimizer steps of the shortened anneal."})
    pretrain_learning_rate: float = field(default=5e-3, metadata={"help": "Constant learning rate of pretraining."})
    fine_tune_steps: int = field(default=50, metadata={"help": "Optimizer steps of each fine-tuning run."})
    fine_tune_learning_rates: list[float] = field(
        default_factory=lambda: [2e-4, 4e-4, 8e-4], metadata={"help": "Learning rates of the fine-tuning runs."}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "Pretrain on this text file instead of docstrings; blank lines end documents."}
    )


@dataclass
class Quickstart:
    """The data, the settings and the progress bar that all stages share."""

    settings: QuickstartArguments
    train_text: object
    held_out_text: object
    train_problems: object
    held_out_problems: object
    tokenizer: object
    bar: tqdm

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    def arguments(self, name: str, **overrides) -> SAMTrainingArguments:
        defaults = {
            "output_dir": str(self.output_dir / folder(name)),
            "per_device_train_batch_size": 16,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "report_to": "none",
            "disable_tqdm": True,
            "log_level": "error",
            "logging_steps": 50,
            "save_strategy": "no",
            "seed": self.settings.seed,
            "use_cpu": True,
        }
        return SAMTrainingArguments(**{**defaults, **overrides})

    def train(self, label: str, model, dataset, args: SAMTrainingArguments, resume_from: str | None = None):
        trainer = SAMTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=without_common_padding,
            callbacks=[_Progress(self.bar, label)],
        )
        # The host prints its logs where it has no bar of its own; there is one bar for everything here.
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    def save(self, model, name: str, kind: str) -> Path:
        """Save a model with its tokenizer; returns the folder."""
        path = self.output_dir / folder(name) / kind
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path

    def pretrain(self, name: str, anneal_steps: int, resume_from: str | None = None, **sam):
        """Pretrain at a constant rate and anneal; with `resume_from`, only the anneal, from that checkpoint."""
        stable = self.settings.pretrain_steps
        args = self.arguments(
            name,
            max_steps=stable + anneal_steps,
            learning_rate=self.settings.pretrain_learning_rate,
            warmup_steps=min(100, stable // 10),
            anneal_steps=anneal_steps,
            save_strategy="no" if resume_from else "steps",
            save_steps=stable,
            **sam,
        )
        return self.train(name, new_model(self.settings.seed), self.train_text, args, resume_from).model

    def fine_tune(self, base: Path, name: str, learning_rate: float):
        args = self.arguments(
            f"{name}-sft",
            max_steps=self.settings.fine_tune_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.0,
        )
        model = AutoModelForCausalLM.from_pretrained(base)
        return self.train(f"{name}, fine-tuning at {learning_rate:g}", model, self.train_problems, args).model


class _Progress(TrainerCallback):
    """Moves the bar of the whole quickstart."""

    def __init__(self, bar: tqdm, label: str):
        self._bar, self._label = bar, label

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar.set_description(self._label)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()


def new_model(seed: int) -> Olmo2ForCausalLM:
    """An OLMo-2 of 0.14M parameters."""
    config = Olmo2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=320,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.set_seed(seed)
    return Olmo2ForCausalLM(config)


def run(settings: QuickstartArguments) -> dict:
    """All stages; returns what `results.json` holds."""
    started = time.perf_counter()
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()

    anneals = {
        "AdamW": {"anneal_steps": settings.anneal_steps},
        f"SAM rho {settings.sam_rho:g}": {
            "anneal_steps": settings.anneal_steps,
            "sam_rho": settings.sam_rho,
            "sam_phase": "anneal",
        },
        "AdamW, shortened": {"anneal_steps": settings.short_anneal_steps},
        "AdamW, equal compute": {"anneal_steps": 2 * settings.anneal_steps},
    }
    rates = settings.fine_tune_learning_rates
    steps = settings.pretrain_steps + sum(anneal["anneal_steps"] for anneal in anneals.values())
    steps += len(anneals) * len(rates) * settings.fine_tune_steps
    with tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
        bar.set_description("reading text")
        train_documents, held_out_documents = load_corpus(settings.text_file)
        tokenizer = train_tokenizer(train_documents, VOCABULARY)
        tokenizer.save_pretrained(output_dir / "tokenizer")
        texts = problem_texts(tokenizer, count=1280, length=288, seed=settings.seed)
        problems = tokenized(texts, tokenizer, length=288)
        save_held_out(output_dir / "data", held_out_documents, texts[1024:])
        quickstart = Quickstart(
            settings,
            train_text=pack(train_documents, tokenizer, length=128),
            held_out_text=pack(held_out_documents, tokenizer, length=128).take(320),
            train_problems=problems.select(range(1024)),
            held_out_problems=problems.select(range(1024, 1280)),
            tokenizer=tokenizer,
            bar=bar,
        )
        checkpoint = None
        results = {}
        for name, anneal in anneals.items():
            model = quickstart.pretrain(name, resume_from=checkpoint, **anneal)
            # The first run passes through the state that all the others start from.
            checkpoint = checkpoint or str(output_dir / folder(name) / f"checkpoint-{settings.pretrain_steps}")
            passes = anneal["anneal_steps"] * (2 if "sam_rho" in anneal else 1)
            results[name] = measure(quickstart, name, model) | {"passes": passes}
    matched = matched_loss(results)
    for result in results.values():
        result["forgetting_at_matched_task_loss"] = forgetting_there(matched, result)
    parameters = sum(param.numel() for param in new_model(settings.seed).parameters())
    return {
        "settings": asdict(settings),
        "parameters": parameters,
        "pretraining_tokens": settings.pretrain_steps * 16 * 128,
        "matched_task_loss": matched,
        "results": results,
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }


def measure(quickstart: Quickstart, name: str, model) -> dict:
    """Base loss, 4-bit damage and the fine-tuning sweep of one annealed model."""
    path = quickstart.save(model, name, "model")
    base_loss = loss_of(model, quickstart.held_out_text)
    quickstart.bar.set_description(f"{name}, 4-bit")
    nf4_loss = loss_of(load_quantized(path, "nf4")[0], quickstart.held_out_text)
    runs = []
    for learning_rate in quickstart.settings.fine_tune_learning_rates:
        tuned = quickstart.fine_tune(path, name, learning_rate)
        quickstart.save(tuned, name, f"tuned-{learning_rate:g}")
        loss = loss_of(tuned, quickstart.held_out_text)
        runs.append(
            {
                "learning_rate": learning_rate,
                "task_loss": loss_of(tuned, quickstart.held_out_problems),
                "held_out_loss": loss,
                "forgetting": loss - base_loss,
            }
        )
    return {"base_loss": base_loss, "nf4_loss": nf4_loss, "nf4_damage": nf4_loss - base_loss, "fine_tuning": runs}


def loss_of(model, rows) -> float:
    """Loss in nats per predicted token."""
    return held_out_loss(model, rows, batch_size=32).loss


def folder(name: str) -> str:
    """A name for the command line."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def save_held_out(path: Path, documents: list[str], problems: list[dict]) -> None:
    """The held-out text and problems, as `hf-sam evaluate` reads them."""
    path.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": documents}).to_json(path / "prose.jsonl")
    Dataset.from_list(problems).to_json(path / "problems.jsonl")


def environment() -> dict:
    """Versions and hardware that the figures belong to."""
    packages = ("hf-sam", "torch", "transformers", "accelerate", "bitsandbytes", "datasets", "reasoning-gym")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    (settings,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    output_dir = Path(settings.output_dir)
    report = run(settings)
    (output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(report["results"], output_dir / "learning_forgetting.png")
    print(table(report["results"], report["matched_task_loss"]))
    print(f"\n{report['parameters']:,} parameters, {report['pretraining_tokens']:,} pretraining tokens, ", end="")
    print(f"{math.ceil(report['seconds'])} s. Results and plot in {output_dir}.")
    for checkpoint in output_dir.glob("*/checkpoint-*"):
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
