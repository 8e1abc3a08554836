"""Command lines of short runs, and what they leave behind."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def flags(files, output_dir, **settings):
    settings = {
        "model_name_or_path": files / "model",
        "output_dir": output_dir,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "learning_rate": "1e-2",
        "save_strategy": "no",
        **settings,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def sft_flags(files, output_dir, **settings):
    return flags(files, output_dir, **{"dataset_name": files / "chats", "max_length": 16, "bf16": "false", **settings})


def saved(output_dir) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir) / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
