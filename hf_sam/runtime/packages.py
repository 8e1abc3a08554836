"""Optional packages, and how to install them."""

import importlib.util

_EXTRA = {"bitsandbytes": "quantization", "peft": "peft", "reasoning_gym": "recipes"}


def require(package: str, what: str) -> None:
    """Raises ImportError, with the command that installs `package`, if it is missing."""
    if importlib.util.find_spec(package) is None:
        extra = _EXTRA.get(package, "eval")
        raise ImportError(f"{what} needs {package}. Install it: pip install 'hf-sam[{extra}]'.")
