"""What noise in the weights does: the KL divergence of arXiv 2604.13627, the sensitivity of arXiv 2503.19206."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.progress import progress
from ..statistics.losses import HeldOutLoss
from .data import shared_batches
from .displacement import Displacement, GaussianNoise, check_noise_survives, floating_parameters
from .loss import CHUNK_LOGITS, TokenSums, counted_logits, held_out_loss
from .measuring import measuring


@dataclass(frozen=True)
class NoiseKL:
    """KL divergence between the next-token distributions without and with noise, by noise sample.

    Attributes:
        samples (`tuple[float, ...]`): nats per token, one for each noise sample.
        sigma (`float`): standard deviation of the noise.
        tokens (`int`): number of tokens that each sample is averaged over.
    """

    samples: tuple[float, ...]
    sigma: float
    tokens: int

    @property
    def value(self) -> float:
        """Mean over the noise samples, in nats per token."""
        return float(np.mean(self.samples))

    @property
    def standard_error(self) -> float:
        """Of the mean, over the noise samples; nan for a single one."""
        return _standard_error(self.samples)

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "samples": list(self.samples),
            "sigma": self.sigma,
            "tokens": self.tokens,
        }


def noise_kl(
    model: torch.nn.Module,
    data,
    *,
    sigma: float = 1e-5,
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
        sigma (`float`, defaults to 1e-5): standard deviation of the noise, the same for all weights.
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
        noises = [GaussianNoise(params, float(sigma), seed=sample_seed(seed, sample)) for sample in range(samples)]
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
    return NoiseKL(values, float(sigma), int(totals[0][1].sum()))


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
        errors = [_standard_error(samples) for samples in self.losses]
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
        ValueError: if the scales cannot be had, or the weights cannot take the noise.
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


def sample_seed(seed: int, sample: int) -> int:
    """A seed of its own for each sample."""
    return (seed << 20) + sample


def _standard_error(samples: Sequence[float]) -> float:
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
