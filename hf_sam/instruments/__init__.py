"""Instruments: what a model forgot, what few bits cost it, how sharp its minimum is.

Every measure is a function of a model and data; it leaves the model bit for bit as it was, and its result does not
depend on batch size, padding, packing or the number of processes.

- loss and forgetting: [`HeldOutData`], [`held_out_loss`], [`forgetting`]
- a sweep of runs: [`forgetting_reduction`], [`forgetting_at`], [`pareto_frontier`], [`inflection_point`]
- quantization: [`quantization_damage`], [`load_quantized`], [`round_to_nearest`]
- sharpness: [`noise_kl`], [`noise_sensitivity`], [`sam_sharpness`], [`hessian_spectrum`]
- landscape: [`loss_along_line`], [`loss_on_plane`], [`loss_on_random_plane`]
- similarity: [`representation_similarity`], [`weight_distance`]
- benchmarks: [`run_benchmarks`], [`score_change`]
- during training: [`ForgettingCallback`], [`SharpnessCallback`]
- all of it at once: `hf_sam.report`, `hf-sam evaluate`
"""

from pathlib import Path

from .benchmarks import OLMES_CORE_9, BenchmarkResult, run_benchmarks, score_change
from .callbacks import ForgettingCallback, SharpnessCallback
from .data import HeldOutData
from .hessian import Hessian, HessianSpectrum, hessian_spectrum
from .landscape import LossLine, LossPlane, loss_along_line, loss_on_plane, loss_on_random_plane
from .loss import held_out_loss
from .noise import NoiseKL, NoiseSensitivity, noise_kl, noise_sensitivity
from .quantization import (
    SCHEMES,
    QuantizationDamage,
    Quantized,
    load_quantized,
    quantization_damage,
    quantized,
    round_to_nearest,
)
from .sharpness import SAMSharpness, sam_sharpness
from .similarity import RepresentationSimilarity, WeightDistance, representation_similarity, weight_distance

__all__ = [
    "OLMES_CORE_9",
    "SCHEMES",
    "BenchmarkResult",
    "ForgettingCallback",
    "HeldOutData",
    "Hessian",
    "HessianSpectrum",
    "LossLine",
    "LossPlane",
    "NoiseKL",
    "NoiseSensitivity",
    "QuantizationDamage",
    "Quantized",
    "RepresentationSimilarity",
    "SAMSharpness",
    "SharpnessCallback",
    "WeightDistance",
    "held_out_loss",
    "hessian_spectrum",
    "load_quantized",
    "loss_along_line",
    "loss_on_plane",
    "loss_on_random_plane",
    "metric_path",
    "noise_kl",
    "noise_sensitivity",
    "quantization_damage",
    "quantized",
    "representation_similarity",
    "round_to_nearest",
    "run_benchmarks",
    "sam_sharpness",
    "score_change",
    "weight_distance",
]


def metric_path() -> str:
    """Folder of the metric `held_out_loss` for `evaluate.load`, which then needs no network."""
    return str(Path(__file__).parent / "metrics" / "held_out_loss")
