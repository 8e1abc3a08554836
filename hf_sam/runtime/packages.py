"""Optional packages, and how to install them."""

import importlib.util

_EXTRA = {
    "bitsandbytes": "quantization",
    "torchao": "torchao",
    "hqq": "quantization",
    "compressed_tensors": "quantization",
    "llmcompressor": "llmcompressor",
    "gguf": "gguf",
    "llama_cpp": "gguf",
    "peft": "peft",
    "reasoning_gym": "recipes",
}
# Packages that no extra installs.
_ALONE = {
    "gptqmodel",
    "optimum",
    "wandb",
    "trackio",
    "tensorboard",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
}


def require(package: str, what: str) -> None:
    """Raises ImportError, with the command that installs `package`, if it is missing."""
    if importlib.util.find_spec(package) is None:
        target = package if package in _ALONE else f"'hf-sam[{_EXTRA.get(package, 'eval')}]'"
        raise ImportError(f"{what} needs {package}. Install it: pip install {target}.")
