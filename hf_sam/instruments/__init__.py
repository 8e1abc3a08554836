"""Instruments: forgetting, sharpness, landscape and similarity of models.

Each is a function of a model and held-out data. It leaves the model bitwise as it was, and its result does not depend
on batch size, padding, packing or the number of processes. Each stands in one file, which registers an [`Instrument`];
`hf-sam evaluate`, reports and callbacks read the [registry](~hf_sam.instruments.registry).

- loss: [`HeldOutData`], [`held_out_loss`]; forgetting is in `hf_sam.statistics`, quantization damage in
  `hf_sam.quantizers`
- sharpness: [`noise_kl`], [`relative_noise_kl`], [`noise_sensitivity`], [`sam_sharpness`], [`hessian_spectrum`],
  [`relative_hessian_trace`], [`weight_norm`]
- radii of SAM: [`radius_profile`]
- landscape: [`loss_along_line`], [`loss_on_plane`], [`loss_on_random_plane`]
- similarity: [`representation_similarity`], [`weight_distance`]
- benchmarks: [`run_benchmarks`], [`score_change`]
- during training: [`ForgettingCallback`], [`SharpnessCallback`]
- all of them from the command line: `hf-sam evaluate`
"""

from pathlib import Path

# Flags and reports show instruments in the order of these imports.
# isort: off
from .loss import held_out_loss
from .benchmarks import OLMES_CORE_9, run_benchmarks
from .kl import NoiseKL, noise_kl
from .relative_kl import relative_noise_kl
from .noise import NoiseSensitivity, noise_sensitivity
from .sam import SAMSharpness, sam_sharpness
from .hessian import Hessian, HessianSpectrum, hessian_spectrum
from .relative_trace import RelativeTrace, relative_hessian_trace
from .weight_norm import weight_norm
from .line import LossLine, loss_along_line
from .plane import loss_on_plane
from .random_plane import loss_on_random_plane
from .hidden_states import RepresentationSimilarity, representation_similarity
from .weights import WeightDistance, weight_distance

# isort: on
from .benchmark_scores import BenchmarkResult, score_change
from .callbacks import ForgettingCallback, SharpnessCallback
from .documents import HeldOutData
from .grid import LossPlane
from .radius import RadiusProfile, radius_profile
from .registry import INSTRUMENTS, Column, Instrument, Plot, Setting, register

__all__ = [
    "INSTRUMENTS",
    "OLMES_CORE_9",
    "BenchmarkResult",
    "Column",
    "ForgettingCallback",
    "HeldOutData",
    "Hessian",
    "HessianSpectrum",
    "Instrument",
    "LossLine",
    "LossPlane",
    "NoiseKL",
    "NoiseSensitivity",
    "Plot",
    "RadiusProfile",
    "RelativeTrace",
    "RepresentationSimilarity",
    "SAMSharpness",
    "Setting",
    "SharpnessCallback",
    "WeightDistance",
    "held_out_loss",
    "hessian_spectrum",
    "loss_along_line",
    "loss_on_plane",
    "loss_on_random_plane",
    "metric_path",
    "noise_kl",
    "noise_sensitivity",
    "radius_profile",
    "register",
    "relative_hessian_trace",
    "relative_noise_kl",
    "representation_similarity",
    "run_benchmarks",
    "sam_sharpness",
    "score_change",
    "weight_distance",
    "weight_norm",
]


def metric_path() -> str:
    """Folder of the metric `held_out_loss` for `evaluate.load`, which then needs no network."""
    return str(Path(__file__).parent / "evaluate_metric" / "held_out_loss")
