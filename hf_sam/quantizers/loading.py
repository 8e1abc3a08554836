"""Quantize a model on disk or in memory, and prove that it is quantized."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel

from ..instruments.displacement import Displacement
from ..instruments.documents import HeldOutData
from ..runtime.disk import check_disk
from ..runtime.models import LocalModel, load_checked
from ..runtime.packages import require
from ..step.replay import RandomState
from .proof import Quantized, matrices, matrices_of_config, prove, quantizable
from .registry import Quantizer, find_quantizer


@contextlib.contextmanager
def quantized(
    model: torch.nn.Module, scheme: str, *, calibration: HeldOutData | None = None
) -> Iterator[tuple[torch.nn.Module, Quantized]]:
    """Context manager: a quantized version of a model in memory.

    Packages that quantize while they load get the model through a temporary folder; the others get a copy. Rounding
    happens in the model itself, which gets its weights back at the end.

    Args:
        model (`torch.nn.Module`): a transformers model in floating point.
        scheme (`str`): one of `QUANTIZERS`.
        calibration ([`HeldOutData`], *optional*): calibration data, for the schemes that need it.

    Raises:
        ValueError: for an unknown scheme, a model with adapters, one that is quantized already, or a scheme that lacks
            calibration data or does not run on this device.
        ImportError: if a package is missing.
        MeasurementError: if a layer stayed in full precision.
    """
    quantizer = find_quantizer(scheme)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "A model with adapters is quantized without them. Merge them first: model.merge_and_unload(), on a copy if "
            "the adapters are still needed."
        )
    already = [name for name, param in model.named_parameters() if not param.is_floating_point()]
    if already:
        raise ValueError(f"{already[0]!r} does not hold floating-point numbers: the model is quantized already.")
    first = next(model.parameters())
    check_runnable(quantizer, first.device.type, calibration)
    if quantizer.through_disk:
        with saved(model) as folder:
            state = RandomState.capture({first.device})  # calibration may draw numbers
            made = load_quantized(
                folder, scheme, dtype=first.dtype, device_map={"": first.device}, calibration=calibration
            )
            state.restore()
            yield made
    elif quantizer.simulated:
        chosen = {name for name, _ in quantizable(model)}
        with Displacement(model, {name: p for name, p in model.named_parameters() if name in chosen}):
            yield model, _apply(quantizer, model)
    else:
        small = copy.deepcopy(model)
        yield small, _apply(quantizer, small)


def load_quantized(
    path: str | Path,
    scheme: str,
    *,
    dtype: torch.dtype = torch.float32,
    device_map="cpu",
    calibration: HeldOutData | None = None,
    **kwargs,
) -> tuple[torch.nn.Module, Quantized]:
    """Load a causal language model quantized, and check that it is.

    Args:
        path (`str` or `Path`): folder or hub id.
        scheme (`str`): one of `QUANTIZERS`.
        dtype (`torch.dtype`, defaults to `torch.float32`): of what is not quantized, and of the computation.
        device_map (`str` or `dict`, defaults to `"cpu"`): where to load it.
        calibration ([`HeldOutData`], *optional*): calibration data, for the schemes that need it.
        kwargs: further arguments of `from_pretrained`, e.g. `revision`.

    Raises:
        ValueError: for an unknown scheme, a checkpoint that lacks weights, or missing calibration data.
        ImportError: if a package is missing.
        MeasurementError: if loading left a layer in full precision.
    """
    quantizer = find_quantizer(scheme)
    check_runnable(quantizer, device_type(device_map), calibration)
    if not quantizer.through_disk:
        return _applied(quantizer, load_checked(path, dtype=dtype, device_map=device_map, **kwargs))
    options = {"calibration": calibration} if quantizer.calibrated else {}
    model = quantizer.load(path, dtype=dtype, device_map=device_map, **options, **kwargs)
    return model.eval(), prove(model, scheme, matrices_of_config(path, **kwargs), quantizer.held)


def load_source_quantized(
    source: LocalModel, scheme: str, dtype: torch.dtype, device_map="cpu", calibration: HeldOutData | None = None
) -> tuple[torch.nn.Module, Quantized]:
    """[`load_quantized`] of a model on disk; adapters are merged first, for some schemes into a temporary copy.

    Raises:
        OSError: if there is no disk space for the copy.
    """
    quantizer = find_quantizer(scheme)
    if not quantizer.through_disk:
        check_runnable(quantizer, device_type(device_map), calibration)
        return _applied(quantizer, source.load(dtype, device_map))
    if source.base is None:
        return load_quantized(source.folder, scheme, dtype=dtype, device_map=device_map, calibration=calibration)
    with saved(source.load(dtype)) as folder:
        return load_quantized(folder, scheme, dtype=dtype, device_map=device_map, calibration=calibration)


def check_runnable(quantizer: Quantizer, device: str, calibration=None) -> None:
    """Check that a quantizer has what it needs.

    Raises:
        ImportError: if a package is missing.
        ValueError: if it needs calibration data, or does not run on this type of device.
    """
    for package in quantizer.packages:
        require(package, f"Quantization to {quantizer.scheme}")
    if problem := quantizer.problem(device):
        raise ValueError(f"Quantization to {quantizer.scheme} cannot run here: {problem}.")
    if quantizer.calibrated and calibration is None:
        raise ValueError(
            f"Quantization to {quantizer.scheme} calibrates on data: give calibration data, e.g. with "
            "--calibration_data, other than the held-out data."
        )


def device_type(device_map) -> str:
    """Type of the device of a `device_map`; of the accelerator for one that spreads a model."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, (str, torch.device)) and device_map != "auto":
        return torch.device(device_map).type
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


@contextlib.contextmanager
def saved(model: torch.nn.Module) -> Iterator[Path]:
    """A temporary folder with the model in it.

    Raises:
        OSError: if the disk has no space for it.
    """
    needed = sum(param.nbytes for param in model.parameters())
    check_disk(tempfile.gettempdir(), needed, "a temporary copy of the model (set TMPDIR to another disk)")
    with tempfile.TemporaryDirectory(prefix="hf-sam-") as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def _applied(quantizer: Quantizer, model: torch.nn.Module) -> tuple[torch.nn.Module, Quantized]:
    return model, _apply(quantizer, model)


def _apply(quantizer: Quantizer, model: torch.nn.Module) -> Quantized:
    plain = matrices(model)
    with torch.no_grad():
        quantizer.apply(model)
    return prove(model, quantizer.scheme, plain, quantizer.held)
