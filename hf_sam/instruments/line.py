"""Loss along the line between two models, with its quadratic prediction (arXiv 2503.19206)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.figure import figure, styles
from ..runtime.progress import progress
from ..runtime.sharding import check_unsharded
from .batches import batches_of
from .displacement import Displacement, Weights, difference, floating_parameters, weights_like
from .hessian import Hessian
from .loss import held_out_loss
from .measuring import measuring
from .registry import Column, Instrument, Plot, number, register


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
        check_unsharded(params, "The loss along a line")
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


def _taylor(model, params, ends, data) -> tuple[float, float]:
    direction = torch.cat([difference(ends[name], param).flatten() for name, param in params.items()]).detach()
    pattern = "^(" + "|".join(map(re.escape, params)) + ")$"
    with Hessian(model, data, parameters=pattern) as hessian:
        slope = hessian.gradient().double() @ direction.double()
        curvature = (hessian @ direction).double() @ direction.double()
    return slope.item(), curvature.item()


def plot_line(lines: Mapping[str, dict]) -> bytes:
    """Loss along the line from the base to each tuned model, with its quadratic prediction.

    Args:
        lines (`Mapping[str, dict]`): [`LossLine`] as `to_dict` gives it, by name.
    """
    label = "way from base (0) to tuned model (1)"
    with figure(label, "held-out loss (nats per token)", "Loss between base and tuned model") as (render, axes):
        highest = max(max(line["losses"]) for line in lines.values())
        lowest = min(min(line["losses"]) for line in lines.values())
        for name, style in styles(lines).items():
            line = lines[name]
            axes.plot(line["positions"], line["losses"], **style)
            if line["quadratic"] is not None:
                dashed = {"linestyle": "--", "color": style["color"], "label": f"{style['label']}, quadratic"}
                axes.plot(line["positions"], line["quadratic"], **dashed)
        # A prediction that leaves the range of the losses must not flatten them.
        room = 0.25 * max(highest - lowest, 1e-6)
        axes.set_ylim(lowest - room, highest + room)
        axes.legend()
        return render()


register(
    Instrument(
        name="line",
        passes=10,
        group="landscape",
        help="loss along the line from the base to each tuned model",
        measure=lambda base, tuned, data, **options: loss_along_line(base, tuned, data, **options).to_dict(),
        subject="pair",
        depends_on=("sharpness_documents",),
        columns=(
            Column("distance", lambda found: number(found["distance"])),
            Column("slope at base", lambda found: number(found["slope"])),
            Column("curvature at base", lambda found: number(found["curvature"])),
            Column("barrier", lambda found: number(found["barrier"])),
        ),
        plots=lambda results: [
            Plot("line", "Loss from base to tuned, and its second-order Taylor expansion", plot_line(results))
        ],
        fp32=True,
        whole=True,
        others_on_host=True,
    )
)
