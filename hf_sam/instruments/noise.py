"""Sensitivity of the loss to noise in proportion to each layer's scale (arXiv 2503.19206, section 3)."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.figure import figure, styles
from ..runtime.progress import progress
from ..statistics.estimate import standard_error
from ..statistics.losses import HeldOutLoss
from .displacement import Displacement, GaussianNoise, check_noise_survives, floating_parameters, sample_seed
from .loss import held_out_loss
from .measuring import measuring
from .registry import Instrument, Plot, register


@dataclass(frozen=True)
class NoiseSensitivity:
    """Held-out loss at each strength of the noise.

    Attributes:
        strengths (`tuple[float, ...]`): noise, in units of each layer's scale.
        loss (`float`): without noise, in nats per token.
        losses (`tuple[tuple[float, ...], ...]`): with noise; one tuple of samples for each strength.
        relative_to (`str`): `"initialization"` or `"weights"`.
    """

    strengths: tuple[float, ...]
    loss: float
    losses: tuple[tuple[float, ...], ...]
    relative_to: str

    @property
    def degradations(self) -> tuple[float, ...]:
        """Mean growth of the loss at each strength, in nats per token."""
        return tuple(float(np.mean(samples)) - self.loss for samples in self.losses)

    def to_dict(self) -> dict:
        """For JSON."""
        errors = [standard_error(samples) for samples in self.losses]
        return {
            "strengths": list(self.strengths),
            "loss": self.loss,
            "losses": [list(samples) for samples in self.losses],
            "degradations": list(self.degradations),
            "standard_errors": errors,
            "relative_to": self.relative_to,
        }


# Strengths of arXiv 2605.02105.
STRENGTHS = (0.009, 0.013, 0.017, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1)


def noise_sensitivity(
    model: torch.nn.Module,
    data,
    *,
    strengths: Sequence[float] = STRENGTHS,
    relative_to: str | dict[str, float] = "initialization",
    samples: int = 3,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> NoiseSensitivity:
    """How much Gaussian noise in proportion to each layer's scale raises the loss (arXiv 2503.19206, section 3).

    Memory: one copy of the weights.

    Args:
        model (`torch.nn.Module`): a causal language model.
        data: what to measure on; see [`held_out_loss`].
        strengths (`Sequence[float]`): standard deviations of the noise in units of the scale of each weight tensor;
            those of arXiv 2605.02105 when omitted.
        relative_to (`str` or `dict[str, float]`, defaults to `"initialization"`): `"initialization"`: the scale is the
            standard deviation of the tensor in a freshly initialized model of the same config, which is 0 for norms
            (they start at a constant), so those get no noise; `"weights"`: the root mean square of the tensor as it
            is; or scales by name.
        samples (`int`, defaults to 3): noise samples at each strength.
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights that get noise; all when omitted.
        seed (`int`, defaults to 0): seed of the noise, and of the fresh model.

    Raises:
        ValueError: if the scales are unknown, or the weights are too coarse to hold the noise.
    """
    if samples < 1 or not strengths or not all(0 < strength < math.inf for strength in strengths):
        raise ValueError(f"strengths={tuple(strengths)} must be positive numbers, and samples={samples} at least 1.")
    with measuring(model, exact=True) as inner, torch.no_grad():
        params = floating_parameters(inner, parameters, "The sensitivity to noise")
        scales = layer_scales(inner, params, relative_to, seed)
        noises = [
            [
                GaussianNoise(
                    params, {name: strength * scale for name, scale in scales.items()}, sample_seed(seed, sample)
                )
                for sample in range(samples)
            ]
            for strength in strengths
        ]
        check_noise_survives(inner, params, noises[0][0])
        before = held_out_loss(inner, data, batch_size=batch_size)
        losses: list[list[HeldOutLoss]] = []
        with Displacement(inner, params) as displacement:
            for at_strength in progress(noises, "sensitivity to noise", len(noises)):
                losses.append([])
                for noise in at_strength:
                    displacement.add_noise(noise)
                    losses[-1].append(held_out_loss(inner, data, batch_size=batch_size))
    return NoiseSensitivity(
        tuple(map(float, strengths)),
        before.loss,
        tuple(tuple(loss.loss for loss in row) for row in losses),
        relative_to if isinstance(relative_to, str) else "given scales",
    )


def layer_scales(
    model: torch.nn.Module, params: dict[str, torch.nn.Parameter], relative_to: str | dict[str, float], seed: int = 0
) -> dict[str, float]:
    """Scale of each weight tensor by name: see `noise_sensitivity`."""
    if isinstance(relative_to, dict):
        unknown = sorted(relative_to.keys() - params.keys())
        if unknown:
            raise ValueError(f"relative_to names weights that the model does not have: {unknown[:3]}.")
        return relative_to
    if relative_to == "weights":
        return {name: param.detach().float().square().mean().sqrt().item() for name, param in params.items()}
    if relative_to != "initialization":
        raise ValueError(f"relative_to={relative_to!r} must be 'initialization', 'weights', or scales by name.")
    fresh = dict(_fresh(model, seed).named_parameters())
    missing = sorted(params.keys() - fresh.keys())
    if missing:
        raise ValueError(
            f"A fresh model of this config has no {missing[0]!r}, so its scale at initialization is unknown. Merge "
            "adapters first, or pass relative_to='weights' or scales by name."
        )
    return {name: fresh[name].float().std(correction=0).item() for name in params}


def _fresh(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    config = getattr(model, "config", None)
    if not hasattr(type(model), "_from_config"):
        raise ValueError(
            "relative_to='initialization' needs a transformers model, to initialize another one of its config; pass "
            "relative_to='weights' or scales by name."
        )
    # The random streams are put back by `measuring`.
    torch.manual_seed(seed)
    return type(model)._from_config(copy.deepcopy(config), dtype=torch.float32)


def plot_noise(measured: Mapping[str, dict]) -> bytes:
    """Growth of the loss with the strength of the noise.

    Args:
        measured (`Mapping[str, dict]`): [`NoiseSensitivity`] as `to_dict` gives it, by name.
    """
    label = "noise, in units of each layer's scale"
    with figure(label, "growth of held-out loss (nats per token)", "Loss under noise in the weights") as (render, axes):
        for name, style in styles(measured).items():
            values = measured[name]
            errors = [error or 0.0 for error in values["standard_errors"]]
            axes.errorbar(values["strengths"], values["degradations"], yerr=errors, capsize=2, **style)
        axes.set_xscale("log")
        axes.legend()
        return render()


register(
    Instrument(
        name="noise",
        group="sharpness",
        help="loss under noise in proportion to each layer's weights at initialization",
        measure=lambda model, data, **options: noise_sensitivity(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        plots=lambda results: [
            Plot("noise", "Growth of the loss under noise in proportion to each layer", plot_noise(results))
        ],
        fp32=True,
    )
)
