"""Wise-FT: interpolate between the base and the tuned weights (Wortsman et al. 2022, arXiv 2109.01903)."""

from collections.abc import Iterator, Sequence

import torch

from ..instruments.displacement import Displacement, Weights, floating_parameters, weights_like
from ..runtime.sharding import check_unsharded


def wise_ft(
    base: torch.nn.Module, tuned: Weights, alphas: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
) -> Iterator[tuple[float, torch.nn.Module]]:
    """Iterate over the models (1 - alpha) base + alpha tuned.

    ```python
    for alpha, model in wise_ft(base, tuned):
        print(alpha, held_out_loss(model, data).loss)
    ```

    Args:
        base (`torch.nn.Module`): the model before fine-tuning. Its weights are set to each interpolation in turn, and
            restored bitwise when the loop ends, also by `break` or an error.
        tuned (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): the model after fine-tuning, or its weights by name.
        alphas (`Sequence[float]`): 0 gives the base model, 1 the tuned model; both are exact.

    Yields:
        `tuple[float, torch.nn.Module]`: alpha, and `base` with the interpolated weights. Save it to keep it.

    Raises:
        ValueError: if the models do not have the same parameters.
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
    """Set the weights of `base` to (1 - alpha) base + alpha tuned permanently, e.g. to save it; returns `base`.

    Raises:
        ValueError: if the models do not have the same parameters.
    """
    params = floating_parameters(base, None, "Wise-FT")
    check_unsharded(params, "Wise-FT")
    ends = weights_like(tuned, params)
    for name, param in params.items():
        param.copy_(torch.lerp(param, ends[name].to(param), float(alpha)))
    return base
