"""Sharpness as the KL divergence under Gaussian noise in the weights (arXiv 2604.13627)."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..statistics.estimate import standard_error
from .batches import shared_batches
from .displacement import Displacement, GaussianNoise, check_noise_survives, floating_parameters, sample_seed
from .layer_scales import layer_scales
from .loss import CHUNK_LOGITS, TokenSums, counted_logits
from .measuring import measuring
from .registry import Column, Instrument, register, with_error


@dataclass(frozen=True)
class NoiseKL:
    """KL divergence between the next-token distributions without and with noise, by noise sample.

    Attributes:
        samples (`tuple[float, ...]`): nats per token, one for each noise sample.
        sigma (`float`): standard deviation of the noise; with `relative_to`, in units of each tensor's scale.
        tokens (`int`): number of tokens that each sample is averaged over.
    """

    samples: tuple[float, ...]
    sigma: float
    tokens: int
    relative_to: str | None = None

    @property
    def value(self) -> float:
        """Mean over the noise samples, in nats per token."""
        return float(np.mean(self.samples))

    @property
    def standard_error(self) -> float:
        """Of the mean, over the noise samples; nan for a single one."""
        return standard_error(self.samples)

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "samples": list(self.samples),
            "sigma": self.sigma,
            "tokens": self.tokens,
            "relative_to": self.relative_to,
        }


def noise_kl(
    model: torch.nn.Module,
    data,
    *,
    sigma: float = 1e-5,
    relative_to: str | None = None,
    samples: int = 10,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> NoiseKL:
    """Sharpness as KL(p_w || p_{w+noise}), averaged over tokens and noise samples (arXiv 2604.13627).

    For small sigma it is sigma^2 / 2 times the trace of the Fisher information per token. It is then far below the
    rounding of fp32, so the divergence is taken in fp64 from logits in the precision of the weights. Each noise sample
    is the same for all batches. Memory: one copy of the weights, and the logits of one batch twice.

    Args:
        model (`torch.nn.Module`): a causal language model with fp32 weights.
        data: what to measure on; see [`held_out_loss`].
        sigma (`float`, defaults to 1e-5): standard deviation of the noise, the same for all weights; with
            `relative_to`, in units of the scale of each weight tensor.
        relative_to (`str`, *optional*): the scale; see [`~hf_sam.instruments.layer_scales.layer_scales`]. Relative to
            `"weights"`, the result does not change with a rescaling of layers that leaves the function alone.
        samples (`int`, defaults to 10): noise samples.
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights that get noise; all when omitted.
        seed (`int`, defaults to 0): seed of the noise.

    Raises:
        ValueError: if `sigma` or `samples` is not positive, the weights are quantized or partitioned by ZeRO-3, or
            too coarse to hold the noise.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma} must be a positive number.")
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or larger.")
    with measuring(model, exact=True) as inner, torch.no_grad():
        params = floating_parameters(inner, parameters, "The KL divergence under noise")
        deviations = float(sigma)
        if relative_to is not None:
            scales = layer_scales(inner, params, relative_to, seed)
            deviations = {name: sigma * scale for name, scale in scales.items()}
        noises = [GaussianNoise(params, deviations, seed=sample_seed(seed, sample)) for sample in range(samples)]
        check_noise_survives(inner, params, noises[0])
        sums = [TokenSums() for _ in range(samples)]
        with Displacement(inner, params) as displacement:
            for batch, counts in shared_batches(data, batch_size, "KL under noise"):
                displacement.back()
                clean, _ = counted_logits(inner, batch)
                for noise, divergences in zip(noises, sums, strict=True):
                    displacement.add_noise(noise)
                    divergences.add(batch, kl_divergence(clean, counted_logits(inner, batch)[0]), counts)
        totals = [divergences.totals() for divergences in sums]
    values = tuple(float(divergences.sum() / tokens.sum()) for divergences, tokens in totals)
    return NoiseKL(values, float(sigma), int(totals[0][1].sum()), relative_to)


def kl_divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || softmax(other)) in fp64, in nats; shapes `(tokens, vocabulary)` to `(tokens,)`.

    In fp32 the sum would cancel down to its rounding errors where the divergence is below about 1e-7.
    """
    rows = max(1, CHUNK_LOGITS // logits.shape[-1] // 2)
    pieces = []
    for p, q in zip(logits.split(rows), other.split(rows), strict=True):
        if p.device.type == "mps":  # has no fp64
            p, q = p.cpu(), q.cpu()
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        pieces.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(pieces)


register(
    Instrument(
        name="kl",
        passes=11,
        group="sharpness",
        help="KL divergence under Gaussian noise of 1e-5",
        measure=lambda model, data, **options: noise_kl(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        columns=(Column("KL under noise of 1e-5", lambda found: with_error(found["value"], found["standard_error"])),),
        note=(
            "KL is the divergence between the next-token distributions without and with noise (nats per token; ± "
            "standard error over noise samples)."
        ),
        scalars=lambda found: {"kl": found["value"]},
        fp32=True,
    )
)
