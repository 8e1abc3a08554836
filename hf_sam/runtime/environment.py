"""Versions and hardware, recorded with every result."""

import contextlib
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from .distributed import rank_and_world

# Packages whose versions can change results.
PACKAGES = ("hf-sam", "torch", "transformers", "accelerate", "bitsandbytes", "peft", "datasets", "lm-eval", "scipy")


def environment() -> dict:
    """Versions, hardware and command line of this process, for JSON."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    program = Path(sys.argv[0]).name
    accelerators = []
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        module = torch.get_device_module(kind)
        names = getattr(module, "get_device_name", lambda index: kind)
        accelerators = [names(index) for index in range(torch.accelerator.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerators": accelerators,
        "processes": rank_and_world()[1],
        "command": ["hf-sam" if program == "__main__.py" else program, *sys.argv[1:]],
        **versions,
    }


def versions() -> dict:
    """The part of [`environment`] that can change results: package versions, accelerators and machine."""
    return {name: value for name, value in environment().items() if name in (*PACKAGES, "accelerators", "machine")}
