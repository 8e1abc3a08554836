"""Sensitivity of the loss to noise in proportion to each layer's scale (arXiv 2503.19206, section 3)."""

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
from .layer_scales import RELATIVE_TO, layer_scales
from .loss import held_out_loss
from .measuring import measuring
from .registry import Instrument, Plot, Setting, register


@dataclass(frozen=True)
class NoiseSensitivity:
    """Held-out loss at each strength of the noise.

    Attributes:
        strengths (`tuple[float, ...]`): noise, in units of each layer's scale.
        loss (`float`): without noise, in nats per token.
        losses (`tuple[tuple[float, ...], ...]`): with noise; one tuple of samples for each strength.
        relative_to (`str`): `"initialization"`, `"weights"` or `"inverse_norm"`.
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
        relative_to (`str` or `dict[str, float]`, defaults to `"initialization"`): the scale of each weight tensor; see
            [`~hf_sam.instruments.layer_scales.layer_scales`]. Norms get no noise relative to their initialization.
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
        passes=13,
        group="sharpness",
        help="loss under noise in proportion to each layer's scale",
        measure=lambda model, data, **options: noise_sensitivity(model, data, **options).to_dict(),
        settings=(
            Setting(
                "noise_relative_to",
                "initialization",
                "Scale of the noise in each tensor: its deviation at initialization (text of arXiv 2605.02105), "
                "inverse_norm (1 / ||W||, its code), or the root mean square of the weights.",
                lambda value: None if value in RELATIVE_TO else f"must be one of {', '.join(RELATIVE_TO)}",
            ),
        ),
        options=lambda settings: {"seed": settings.seed, "relative_to": settings.noise_relative_to},
        plots=lambda results: [
            Plot("noise", "Growth of the loss under noise in proportion to each layer", plot_noise(results))
        ],
        fp32=True,
    )
)
