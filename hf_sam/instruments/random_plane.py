"""Loss along two random filter-normalized directions (Li 2018, arXiv 1712.09913, section 4)."""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..runtime.sharding import check_unsharded
from .batches import batches_of
from .displacement import GaussianNoise, floating_parameters, sample_seed, transposed_weights
from .grid import LossPlane, plot_plane, scan_grid
from .measuring import measuring
from .registry import Instrument, Plot, register


def loss_on_random_plane(
    model: torch.nn.Module, data, *, radius: float = 1.0, steps: int = 9, seed: int = 0, batch_size: int = 8
) -> LossPlane:
    """Loss along two random filter-normalized directions (Li 2018, arXiv 1712.09913, section 4).

    The weights of each output of a matrix get a random direction of their own norm; biases and norms stay.

    Args:
        model (`torch.nn.Module`): the model at the origin; moved, and back in its place afterwards.
        data: what to measure on; see [`held_out_loss`].
        radius (`float`, defaults to 1.0): the grid reaches from -radius to radius along both directions.
        steps (`int`, defaults to 9): points along each axis; an odd number has the model itself on the grid.
        seed (`int`, defaults to 0): seed of the directions.
        batch_size (`int`, defaults to 8): rows a batch.
    """
    if not 0 < radius < math.inf or steps < 2:
        raise ValueError(f"radius={radius} must be positive, and steps={steps} at least 2.")
    data = list(batches_of(data, batch_size))
    with measuring(model) as inner:
        params = floating_parameters(inner, None, "The loss along random directions")
        check_unsharded(params, "The loss along random directions")
        noises = [GaussianNoise(params, 1.0, sample_seed(seed, axis)) for axis in (0, 1)]
        axis = tuple(float(value) for value in np.linspace(-radius, radius, steps))
        transposed = transposed_weights(inner)

        def place(px: float, py: float) -> Callable:
            def moved(name: str, w: torch.Tensor) -> torch.Tensor:
                first, second = (filter_normalized(noise, name, w, name in transposed) for noise in noises)
                return w + px * first + py * second

            return moved

        losses = scan_grid(inner, params, data, axis, axis, place)
    return LossPlane(axis, axis, losses, {"model": (0.0, 0.0)})


def filter_normalized(noise: GaussianNoise, name: str, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A random direction whose filters (what makes one output) have the norms of those of `weight`; zero for vectors.

    Args:
        weight (`torch.Tensor`): shape `(..., outputs, inputs)`; `(inputs, outputs)` if `transposed`.
    """
    if weight.dim() < 2:
        return torch.zeros_like(weight)
    direction = torch.empty_like(weight)
    noise.add(name, torch.zeros_like(weight), direction)
    inputs = 0 if transposed else -1
    norms = [tensor.norm(dim=inputs, keepdim=True) for tensor in (weight, direction)]
    return direction * (norms[0] / norms[1].clamp(min=1e-12))


register(
    Instrument(
        name="random",
        passes=81,
        group="landscape",
        help="loss along two random directions around each model",
        measure=lambda model, data, **options: loss_on_random_plane(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        plots=lambda results: [
            Plot(f"random_{name}", f"Loss along random directions around {name}", plot_plane(plane))
            for name, plane in results.items()
        ],
        fp32=True,
        whole=True,
    )
)
