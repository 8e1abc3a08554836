"""Clear cached copies of the weights, which would hide a perturbation.

Autocast caches 16-bit casts until its outermost context ends, `parametrize.cached` the parametrized weights,
Transformer Engine fp8 weights, torchao fp8 scales computed after the optimizer step, and bitsandbytes 8-bit copies of
trained weights. All of them are recomputed when they are missing.
"""

from collections.abc import Iterable

import torch
from torch.nn.utils import parametrize


class WeightCaches:
    """The weight caches of some models.

    Args:
        models (`Iterable[torch.nn.Module]`): models whose weights SAM perturbs.
    """

    def __init__(self, models: Iterable[torch.nn.Module]):
        modules = [module for model in models for module in model.modules()]
        self._fp8 = [module for module in modules if isinstance(vars(module).get("_fp8_workspaces"), dict)]
        self._int8 = [module for module in modules if _keeps_int8_copies(module)]
        holders = [_scale_holder(param) for module in modules for param in module._parameters.values()]
        self._scaled = [holder for holder in holders if holder is not None]

    def clear(self) -> None:
        """Clear all caches; called after each change of the weights."""
        torch.clear_autocast_cache()
        parametrize._cache.clear()
        for module in self._fp8:
            module._fp8_workspaces.clear()
        for module in self._int8:
            module.state.CB = module.state.SCB = None
        for holder in self._scaled:
            holder._precomputed_scale = None


def _keeps_int8_copies(module: torch.nn.Module) -> bool:
    """Whether `module` is a bitsandbytes layer that trains its weights but computes with 8-bit copies of them."""
    state = vars(module).get("state")
    return getattr(state, "has_fp16_weights", False) and hasattr(state, "CB") and hasattr(state, "SCB")


def _scale_holder(param: torch.Tensor | None) -> torch.Tensor | None:
    """The torchao tensor behind `param` that may cache an fp8 scale, or None."""
    local = getattr(param, "_local_tensor", param)
    return local if hasattr(local, "_precomputed_scale") else None
