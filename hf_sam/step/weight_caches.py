"""Copies of weights that others keep, which a perturbation would not reach.

Autocast keeps 16-bit casts for as long as its outermost region lasts, `parametrize.cached` the parametrized weights,
Transformer Engine its fp8 weights, torchao scales that were computed after the optimizer step, and bitsandbytes 8-bit
copies of weights in training. All of them are made anew when they are missing.
"""

from collections.abc import Iterable

import torch
from torch.nn.utils import parametrize


class WeightCaches:
    """The caches of the weights of some models.

    Args:
        models (`Iterable[torch.nn.Module]`): models whose weights SAM changes.
    """

    def __init__(self, models: Iterable[torch.nn.Module]):
        modules = [module for model in models for module in model.modules()]
        self._fp8 = [module for module in modules if isinstance(vars(module).get("_fp8_workspaces"), dict)]
        self._int8 = [module for module in modules if _keeps_int8_copies(module)]
        holders = [_scale_holder(param) for module in modules for param in module._parameters.values()]
        self._scaled = [holder for holder in holders if holder is not None]

    def clear(self) -> None:
        """Forget everything that was derived from the weights, after they were changed."""
        torch.clear_autocast_cache()
        parametrize._cache.clear()
        for module in self._fp8:
            module._fp8_workspaces.clear()
        for module in self._int8:
            module.state.CB = module.state.SCB = None
        for holder in self._scaled:
            holder._precomputed_scale = None


def _keeps_int8_copies(module: torch.nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes that trains weights and multiplies with 8-bit copies of them."""
    state = vars(module).get("state")
    return getattr(state, "has_fp16_weights", False) and hasattr(state, "CB") and hasattr(state, "SCB")


def _scale_holder(param: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor of torchao that may hold an fp8 scale of its weight."""
    local = getattr(param, "_local_tensor", param)
    return local if hasattr(local, "_precomputed_scale") else None
