"""How far the weights of two models are apart, by layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .displacement import Weights, difference, weights_like
from .registry import Instrument, register


@dataclass(frozen=True)
class WeightDistance:
    """How far the weights of one layer moved.

    Attributes:
        layer (`str`): `"layer 3"`, or the name of a module outside of the layers.
        distance (`float`): ||w1 - w0||.
        relative (`float`): ||w1 - w0|| / ||w0||.
    """

    layer: str
    distance: float
    relative: float


def weight_distance(model: torch.nn.Module, other: Weights) -> list[WeightDistance]:
    """Distance between the weights of two models, by layer.

    Args:
        model (`torch.nn.Module`): w0.
        other (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): w1.

    Raises:
        ValueError: if the two do not have the same weights.
    """
    params = {name: param for name, param in model.named_parameters() if param.is_floating_point()}
    ends = weights_like(other, params)
    squares: dict[str, list[float]] = {}
    for name, param in params.items():
        moved = difference(ends[name].to(param.device, torch.float32), param.float())
        sums = squares.setdefault(_layer_of(name), [0.0, 0.0])
        sums[0] += moved.double().square().sum().item()
        sums[1] += param.detach().double().square().sum().item()
    return [
        WeightDistance(layer, moved**0.5, (moved / norm) ** 0.5 if norm else float("nan"))
        for layer, (moved, norm) in squares.items()
    ]


def _layer_of(name: str) -> str:
    number = re.search(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.", name)
    if number:
        return f"layer {number[1]}"
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def _tables(results: Mapping[str, dict]) -> list[tuple[list[str], list[list[str]]]]:
    rows = []
    for layers in zip(*(found["layers"] for found in results.values()), strict=True):
        cells = [f"{layer['distance']:.4g} ({_share(layer['relative'])})" for layer in layers]
        rows.append([layers[0]["layer"], *cells])
    return [(["weights", *(f"distance of {name}" for name in results)], rows)]


def _share(value: float | None) -> str:
    return "from zero" if value is None else f"{100 * value:.2f}%"


register(
    Instrument(
        name="weights",
        passes=0,
        group="similarity",
        help="distance of the weights from those of the base, by layer",
        measure=lambda base, tuned, data, **options: {
            "layers": [vars(layer) for layer in weight_distance(base, tuned)]
        },
        subject="pair",
        depends_on=(),
        tables=_tables,
        whole=True,
        others_on_host=True,
    )
)
