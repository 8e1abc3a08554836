"""Checks of weight files before they are loaded, and of loaded weights."""

import json
from pathlib import Path

import torch


def check_weights(folder: Path) -> None:
    """Check that the safetensors files of a model or an adapter are complete; reads only their headers.

    Raises:
        ValueError: if a file is damaged or truncated, or a file or a weight of the index is missing; the message
            names the file.
    """
    from safetensors import SafetensorError, safe_open

    names: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names[path.name] = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged or truncated ({error}). Copy or download it again.") from error
    for path in sorted(folder.glob("*.safetensors.index.json")):
        for file, weights in _weights_by_file(path).items():
            if file not in names:
                raise ValueError(
                    f"{str(path.parent / file)!r} is missing, but {path.name!r} names it. Copy or download it again."
                )
            if lacking := sorted(weights - names[file]):
                raise ValueError(
                    f"{str(path.parent / file)!r} lacks {len(lacking)} of the weights that {path.name!r} names, such "
                    f"as {lacking[0]!r}. Copy or download both again."
                )


def _weights_by_file(index: Path) -> dict[str, set[str]]:
    files: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(index)!r} is damaged: it has no readable weight_map ({error!r}). Copy or download it again."
        ) from error
    return files


@torch.no_grad()
def check_finite(model: torch.nn.Module, name: str) -> None:
    """Check that no weight of a model is NaN or infinite.

    Raises:
        FloatingPointError: if a weight is NaN or infinite; the message uses `name` for the model.
    """
    for weight, param in model.named_parameters():
        if param.is_floating_point() and not torch.isfinite(param).all():
            raise FloatingPointError(
                f"The weights of {name!r} are not finite numbers, first in {weight!r}: its training diverged."
            )
