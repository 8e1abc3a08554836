"""Trace of the Hessian in units of each weight tensor, which a rescaling of layers does not change."""

from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.progress import progress
from ..statistics.estimate import standard_error
from .hessian import Hessian
from .layer_scales import layer_scales
from .registry import Column, Instrument, register, with_error


@dataclass(frozen=True)
class RelativeTrace:
    """Trace of D H D, with the Hessian H of the loss per token and the scales D of the weights.

    Attributes:
        value (`float`): the estimate, in nats per token.
        standard_error (`float`): over the probes; nan for a single one.
    """

    value: float
    standard_error: float

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(vars(self))


def relative_hessian_trace(
    model: torch.nn.Module,
    data,
    *,
    probes: int = 10,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> RelativeTrace:
    """Trace of the Hessian by weights in units of the root mean square of their tensor (Hutchinson's estimator).

    Noise of relative size s in all weights raises the loss by s^2 / 2 times this trace, for small s. A rescaling of
    layers that leaves the function of the model alone does not change it, but changes the plain trace (arXiv
    1703.04933).

    Args:
        model (`torch.nn.Module`): a causal language model with fp32 or fp64 weights, whole on each process.
        data: what to measure on; see [`held_out_loss`].
        probes (`int`, defaults to 10): Hessian-vector products.
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights; see [`Hessian`].
        seed (`int`, defaults to 0): seed of the probes.

    Raises:
        ValueError: if `probes` is not positive, or weights are quantized, in 16 bits or sharded.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} must be 1 or larger.")
    with Hessian(model, data, batch_size=batch_size, parameters=parameters) as hessian:
        scales = layer_scales(model, hessian.params, "weights")
        sizes = [torch.full((param.numel(),), scales[name]) for name, param in hessian.params.items()]
        scale = torch.cat(sizes).to(device=hessian.device, dtype=hessian.dtype)
        estimates = []
        for probe in progress(range(probes), "relative Hessian trace", probes):
            signs = np.random.default_rng([seed, probe]).integers(0, 2, hessian.size, dtype=np.int8) * 2 - 1
            vector = torch.from_numpy(signs).to(device=hessian.device, dtype=hessian.dtype) * scale
            estimates.append((vector.double() @ (hessian @ vector).double()).item())
    return RelativeTrace(float(np.mean(estimates)), standard_error(estimates))


register(
    Instrument(
        name="relative_trace",
        passes=60,
        group="sharpness",
        help="trace of the Hessian in units of each weight tensor; does not change with its scale",
        measure=lambda model, data, **options: relative_hessian_trace(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        columns=(Column("relative Hessian trace", lambda found: with_error(found["value"], found["standard_error"])),),
        note="The relative trace is that of the Hessian by weights in units of their tensor's root mean square.",
        scalars=lambda found: {"relative_trace": found["value"]},
        fp32=True,
        whole=True,
    )
)
