"""Wise-FT: forget less by going only part of the way (Wortsman 2022, arXiv 2109.01903)."""

from collections.abc import Iterator, Sequence

import torch

from ..instruments.displacement import Displacement, Weights, floating_parameters, weights_like
from ..runtime.sharding import check_unsharded


def wise_ft(
    base: torch.nn.Module, tuned: Weights, alphas: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
) -> Iterator[tuple[float, torch.nn.Module]]:
    """The models (1 - alpha) base + alpha tuned, one after the other.

    ```python
    for alpha, model in wise_ft(base, tuned):
        print(alpha, held_out_loss(model, data).loss)
    ```

    Args:
        base (`torch.nn.Module`): the model before fine-tuning. Its weights are moved to each interpolation in turn, and
            put back bit for bit when the loop ends, also by `break` or an error.
        tuned (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): the model after it, or its weights by name.
        alphas (`Sequence[float]`): 0 is the base, 1 the tuned model; both are exact.

    Yields:
        `tuple[float, torch.nn.Module]`: alpha and `base` at that interpolation. To keep one, save it.

    Raises:
        ValueError: if the two do not have the same weights.
    """
    params = floating_parameters(base, None, "Wise-FT")
    check_unsharded(params, "Wise-FT")
    ends = weights_like(tuned, params)
    with Displacement(base, params) as displacement:
        for alpha in alphas:
            displacement.move(lambda name, w, alpha=alpha: torch.lerp(w, ends[name].to(w), float(alpha)))
            yield alpha, base


@torch.no_grad()
def interpolate(base: torch.nn.Module, tuned: Weights, alpha: float) -> torch.nn.Module:
    """Move `base` to (1 - alpha) base + alpha tuned for good, e.g. to save it; returns `base`.

    Raises:
        ValueError: if the two do not have the same weights.
    """
    params = floating_parameters(base, None, "Wise-FT")
    check_unsharded(params, "Wise-FT")
    ends = weights_like(tuned, params)
    for name, param in params.items():
        param.copy_(torch.lerp(param, ends[name].to(param), float(alpha)))
    return base
