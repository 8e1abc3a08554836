"""Optional packages, and what to install when one is missing."""

import importlib.util

_EXTRA = {"bitsandbytes": "quantization", "peft": "peft"}


def require(package: str, what: str) -> None:
    """Raises ImportError that says what to install, if `package` is missing."""
    if importlib.util.find_spec(package) is None:
        extra = _EXTRA.get(package, "eval")
        raise ImportError(f"{what} needs {package}. Install it: pip install 'hf-sam[{extra}]'.")
