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

import importlib
from pathlib import Path

# Imported where first used: together they take a while, and some need the extras.
_HOME = {
    "benchmarks": ("OLMES_CORE_9", "BenchmarkResult", "run_benchmarks", "score_change"),
    "callbacks": ("ForgettingCallback", "SharpnessCallback"),
    "data": ("HeldOutData",),
    "estimate": ("Estimate",),
    "frontier": (
        "InflectionPoint",
        "Reduction",
        "TunedRun",
        "forgetting_at",
        "forgetting_reduction",
        "inflection_point",
        "pareto_frontier",
        "shared_range",
    ),
    "hessian": ("Hessian", "HessianSpectrum", "hessian_spectrum"),
    "landscape": ("LossLine", "LossPlane", "loss_along_line", "loss_on_plane", "loss_on_random_plane"),
    "loss": ("HeldOutLoss", "forgetting", "held_out_loss"),
    "noise": ("NoiseKL", "NoiseSensitivity", "noise_kl", "noise_sensitivity"),
    "quantization": (
        "SCHEMES",
        "QuantizationDamage",
        "Quantized",
        "load_quantized",
        "quantization_damage",
        "quantized",
        "round_to_nearest",
    ),
    "sharpness": ("SAMSharpness", "sam_sharpness"),
    "similarity": ("RepresentationSimilarity", "WeightDistance", "representation_similarity", "weight_distance"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE, "metric_path"])


def metric_path() -> str:
    """Folder of the metric `held_out_loss` for `evaluate.load`, which then needs no network."""
    return str(Path(__file__).parent / "metrics" / "held_out_loss")


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
