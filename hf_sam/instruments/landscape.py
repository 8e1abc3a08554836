"""Loss landscapes: along the line between two models, on the plane through three, and along random directions."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..runtime.progress import progress
from ..runtime.sharding import check_whole
from .data import batches_of
from .displacement import (
    Displacement,
    GaussianNoise,
    Weights,
    difference,
    floating_parameters,
    transposed_weights,
    weights_like,
)
from .hessian import Hessian
from .loss import held_out_loss
from .measuring import measuring
from .noise import sample_seed


@dataclass(frozen=True)
class LossLine:
    """Loss along w0 + t (w1 - w0), and its second-order Taylor expansion at w0.

    Attributes:
        positions (`tuple[float, ...]`): t; 0 is the first model, 1 the second.
        losses (`tuple[float, ...]`): nats per token.
        quadratic (`tuple[float, ...]` or `None`): L(w0) + t g.d + t^2 / 2 d.Hd at the same positions.
        slope, curvature (`float` or `None`): g.d and d.Hd, for d = w1 - w0.
        distance (`float`): ||w1 - w0||.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    quadratic: tuple[float, ...] | None
    slope: float | None
    curvature: float | None
    distance: float

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the straight line between the losses at the two ends of the scan."""
        ends = np.interp(self.positions, (self.positions[0], self.positions[-1]), (self.losses[0], self.losses[-1]))
        return float(np.max(np.asarray(self.losses) - ends))

    def to_dict(self) -> dict:
        """For JSON."""
        return {**vars(self), "barrier": self.barrier}


def loss_along_line(
    model: torch.nn.Module,
    other: Weights,
    data,
    *,
    positions: Sequence[float] = tuple(i / 10 for i in range(11)),
    quadratic: bool = True,
    batch_size: int = 8,
) -> LossLine:
    """Loss along the line from one model to another, with its quadratic prediction (arXiv 2503.19206).

    Args:
        model (`torch.nn.Module`): the model at t = 0; moved along the line, and back in its place afterwards.
        other (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): the model at t = 1, or its weights by name.
        data: what to measure on; see [`held_out_loss`].
        positions (`Sequence[float]`): ascending t; 0, 0.1, ... 1 when omitted.
        quadratic (`bool`, defaults to `True`): take one gradient and one Hessian-vector product for the prediction.
        batch_size (`int`, defaults to 8): rows a batch.

    Raises:
        ValueError: if the two models do not have the same weights, or positions do not ascend.
    """
    positions = tuple(map(float, positions))
    if len(positions) < 2 or list(positions) != sorted(set(positions)):
        raise ValueError(f"positions={positions} must be two or more ascending numbers.")
    data = list(batches_of(data, batch_size))
    slope = curvature = None
    with measuring(model) as inner:
        params = floating_parameters(inner, None, "The loss along a line")
        check_whole(params, "The loss along a line")
        ends = weights_like(other, params)
        if quadratic:
            slope, curvature = _taylor(inner, params, ends, data)
        losses = []
        with Displacement(inner, params) as displacement:
            squared = [difference(ends[name], w).double().square().sum() for name, w in displacement.origin.items()]
            for t in progress(positions, "loss along the line", len(positions)):
                # lerp is exact at both ends.
                displacement.move(lambda name, w, t=t: torch.lerp(w, ends[name].to(w), t))
                losses.append(held_out_loss(inner, data).loss)
            if quadratic:
                displacement.back()
                start = held_out_loss(inner, data).loss
    prediction = tuple(start + t * slope + t * t / 2 * curvature for t in positions) if quadratic else None
    return LossLine(positions, tuple(losses), prediction, slope, curvature, math.sqrt(sum(map(float, squared))))


@dataclass(frozen=True)
class LossPlane:
    """Loss on a grid of a plane in weight space.

    Attributes:
        x, y (`tuple[float, ...]`): coordinates along two orthogonal directions: distances in weight space for a
            plane through models, multiples of the filter-normalized directions for a random one.
        losses (`tuple[tuple[float, ...], ...]`): nats per token; one row for each y.
        points (`dict[str, tuple[float, float]]`): where the models lie.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    points: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(vars(self))


def loss_on_plane(
    model: torch.nn.Module,
    first: Weights,
    second: Weights,
    data,
    *,
    steps: int = 9,
    margin: float = 0.25,
    names: tuple[str, str, str] = ("base", "first", "second"),
    batch_size: int = 8,
) -> LossPlane:
    """Loss on the plane through three models (Garipov 2018, arXiv 1802.10026; arXiv 2604.13627).

    Args:
        model (`torch.nn.Module`): the model at the origin; moved, and back in its place afterwards.
        first, second (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): the others. The x axis leads to the first.
        data: what to measure on; see [`held_out_loss`].
        steps (`int`, defaults to 9): points along each axis.
        margin (`float`, defaults to 0.25): how far the grid reaches beyond the models, as a share of their extent.
        names (`tuple[str, str, str]`): labels of the three points.
        batch_size (`int`, defaults to 8): rows a batch.

    Raises:
        ValueError: if the models do not have the same weights, or lie on one line.
    """
    data = list(batches_of(data, batch_size))
    with measuring(model) as inner:
        params = floating_parameters(inner, None, "The loss on a plane")
        check_whole(params, "The loss on a plane")
        a, b = weights_like(first, params), weights_like(second, params)
        aa = ab = bb = 0.0
        for name, param in params.items():
            u, v = difference(a[name], param).double(), difference(b[name], param).double()
            aa, ab, bb = aa + float((u * u).sum()), ab + float((u * v).sum()), bb + float((v * v).sum())
        height = math.sqrt(max(0.0, bb - ab * ab / aa)) if aa > 0 else 0.0
        if height <= 1e-6 * math.sqrt(max(bb, 1e-300)):
            raise ValueError("The three models lie on one line, or two of them are the same: there is no plane.")
        length = math.sqrt(aa)
        points = {names[0]: (0.0, 0.0), names[1]: (length, 0.0), names[2]: (ab / length, height)}
        x, y = _axis([p[0] for p in points.values()], steps, margin), _axis([0.0, height], steps, margin)

        def place(px: float, py: float) -> Callable:
            beta = py / height
            alpha = (px - beta * ab / length) / length
            return lambda name, w: w + alpha * difference(a[name], w) + beta * difference(b[name], w)

        losses = _scan(inner, params, data, x, y, place)
    return LossPlane(x, y, losses, points)


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
        check_whole(params, "The loss along random directions")
        noises = [GaussianNoise(params, 1.0, sample_seed(seed, axis)) for axis in (0, 1)]
        axis = tuple(float(value) for value in np.linspace(-radius, radius, steps))
        transposed = transposed_weights(inner)

        def place(px: float, py: float) -> Callable:
            def moved(name: str, w: torch.Tensor) -> torch.Tensor:
                first, second = (filter_normalized(noise, name, w, name in transposed) for noise in noises)
                return w + px * first + py * second

            return moved

        losses = _scan(inner, params, data, axis, axis, place)
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


def _scan(model, params, data, x, y, place) -> tuple[tuple[float, ...], ...]:
    points = [(px, py) for py in y for px in x]
    with Displacement(model, params) as displacement:
        losses = []
        for px, py in progress(points, "loss on the plane", len(points)):
            displacement.move(place(px, py))
            losses.append(held_out_loss(model, data).loss)
    return tuple(tuple(losses[row * len(x) : (row + 1) * len(x)]) for row in range(len(y)))


def _axis(coordinates: list[float], steps: int, margin: float) -> tuple[float, ...]:
    if steps < 2 or margin < 0:
        raise ValueError(f"steps={steps} must be at least 2, and margin={margin} not negative.")
    low, high = min(coordinates), max(coordinates)
    reach = margin * (high - low)
    return tuple(float(value) for value in np.linspace(low - reach, high + reach, steps))


def _taylor(model, params, ends, data) -> tuple[float, float]:
    direction = torch.cat([difference(ends[name], param).flatten() for name, param in params.items()]).detach()
    pattern = "^(" + "|".join(map(re.escape, params)) + ")$"
    with Hessian(model, data, parameters=pattern) as hessian:
        slope = hessian.gradient().double() @ direction.double()
        curvature = (hessian @ direction).double() @ direction.double()
    return slope.item(), curvature.item()
