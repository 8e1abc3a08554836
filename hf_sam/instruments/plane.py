"""Loss on the plane through three models (Garipov 2018, arXiv 1802.10026; arXiv 2604.13627)."""

import math
from collections.abc import Callable

import torch

from ..runtime.sharding import check_unsharded
from .batches import batches_of
from .displacement import Weights, difference, floating_parameters, weights_like
from .grid import LossPlane, axis_over, plot_plane, scan_grid
from .measuring import measuring
from .registry import Instrument, Plot, register


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
        check_unsharded(params, "The loss on a plane")
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
        x, y = axis_over([p[0] for p in points.values()], steps, margin), axis_over([0.0, height], steps, margin)

        def place(px: float, py: float) -> Callable:
            beta = py / height
            alpha = (px - beta * ab / length) / length
            return lambda name, w: w + alpha * difference(a[name], w) + beta * difference(b[name], w)

        losses = scan_grid(inner, params, data, x, y, place)
    return LossPlane(x, y, losses, points)


register(
    Instrument(
        name="plane",
        passes=81,
        group="landscape",
        help="loss on the plane through the base and the first two tuned models",
        measure=lambda base, first, second, data, **options: loss_on_plane(
            base, first, second, data, **options
        ).to_dict(),
        subject="triple",
        depends_on=("sharpness_documents",),
        plots=lambda results: [
            Plot("plane", f"Loss on the plane through the base, {names}", plot_plane(plane))
            for names, plane in results.items()
        ],
        fp32=True,
        whole=True,
        others_on_host=True,
    )
)
