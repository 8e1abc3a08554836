"""Scales of weight tensors, in units of which instruments add noise."""

import copy

import torch

from ..runtime.sharding import gathered

# What the standard deviation of the noise may be in proportion to; see [`layer_scales`].
RELATIVE_TO = ("initialization", "weights", "inverse_norm")


def layer_scales(
    model: torch.nn.Module, params: dict[str, torch.nn.Parameter], relative_to: str | dict[str, float], seed: int = 0
) -> dict[str, float]:
    """Scale of each weight tensor by name.

    Args:
        model (`torch.nn.Module`): the model.
        params (`dict[str, torch.nn.Parameter]`): its weights by name.
        relative_to (`str` or `dict[str, float]`): `"initialization"`: the standard deviation of the tensor in a freshly
            initialized model of the same config (arXiv 2503.19206), which is 0 for norms, as they start at a constant;
            `"weights"`: the root mean square of the tensor as it is, so that a rescaling of layers that leaves the
            function of the model alone changes nothing; `"inverse_norm"`: 1 / ||W||_F of the tensor as it is (the code
            of arXiv 2605.02105, where its text has the first one); or scales by name.
        seed (`int`): seed of the fresh model.

    Raises:
        ValueError: if the scales are unknown.
    """
    if isinstance(relative_to, dict):
        unknown = sorted(relative_to.keys() - params.keys())
        if unknown:
            raise ValueError(f"relative_to names weights that the model does not have: {unknown[:3]}.")
        return relative_to
    if relative_to not in RELATIVE_TO:
        raise ValueError(f"relative_to={relative_to!r} must be one of {', '.join(RELATIVE_TO)}, or scales by name.")
    if relative_to != "initialization":
        squares = {name: _number(param.detach().float().square().sum()) for name, param in params.items()}
        if relative_to == "weights":
            return {name: (squares[name] / param.numel()) ** 0.5 for name, param in params.items()}
        return {name: square**-0.5 if square else 0.0 for name, square in squares.items()}
    fresh = dict(_fresh(model, seed).named_parameters())
    missing = sorted(params.keys() - fresh.keys())
    if missing:
        raise ValueError(
            f"A fresh model of this config has no {missing[0]!r}, so its scale at initialization is unknown. Merge "
            "adapters first, or pass relative_to='weights' or scales by name."
        )
    return {name: fresh[name].float().std(correction=0).item() for name in params}


def _number(value: torch.Tensor) -> float:
    """A number, which FSDP2 may hold as a sum over ranks."""
    return gathered(value).item()


def _fresh(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    config = getattr(model, "config", None)
    if not hasattr(type(model), "_from_config"):
        raise ValueError(
            "relative_to='initialization' needs a transformers model, to initialize another one of its config; pass "
            "relative_to='weights' or scales by name."
        )
    # The random streams are put back by `measuring`.
    torch.manual_seed(seed)
    return type(model)._from_config(copy.deepcopy(config), dtype=torch.float32)
