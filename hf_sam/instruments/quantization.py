"""Quantization damage: NF4, FP4 and INT8 of bitsandbytes, and group-wise rounding, each with a proof.

A model that silently stayed in full precision shows no damage at all, so every path ends in a check of layer types,
data types and bytes.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ..runtime.disk import check_disk
from ..runtime.errors import MeasurementError
from ..runtime.models import LocalModel, load_checked
from ..runtime.packages import require
from ..statistics.estimate import Estimate
from ..statistics.losses import HeldOutLoss, forgetting
from .displacement import Displacement
from .loss import held_out_loss

# Share of the weight matrices that may stay in full precision, e.g. the kernels of short convolutions.
_LEFT = 0.05

SCHEMES = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "rtn4", "rtn3")


@dataclass(frozen=True)
class Quantized:
    """What was quantized in a model.

    Attributes:
        scheme (`str`): one of `SCHEMES`.
        layers (`int`): quantized weight tensors.
        weights (`int`): numbers in them.
        bytes_before, bytes_after (`int`): bytes of those tensors in 16 bits, and now, scales included. (Rounding to
            nearest is simulated: its weights are the rounded values in the old type; the bytes are what they would
            take.)
    """

    scheme: str
    layers: int
    weights: int
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * self.bytes_after / self.weights


@dataclass(frozen=True)
class QuantizationDamage:
    """Loss before and after, and what was quantized.

    Attributes:
        quantized ([`Quantized`]): proof that it was.
        before, after ([`HeldOutLoss`]): held-out loss in full precision and quantized.
        damage ([`Estimate`]): after minus before, in nats per token.
    """

    quantized: Quantized
    before: HeldOutLoss
    after: HeldOutLoss
    damage: Estimate

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "quantized": {**asdict(self.quantized), "bits": self.quantized.bits},
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "damage": self.damage.to_dict(),
        }


def quantization_damage(
    model: torch.nn.Module,
    data,
    scheme: str = "nf4",
    *,
    before: HeldOutLoss | None = None,
    batch_size: int = 8,
) -> QuantizationDamage:
    """Held-out loss of a model before and after quantization.

    Args:
        model (`torch.nn.Module`): a transformers model in floating point; it is not changed.
        data: what to measure on; see [`held_out_loss`].
        scheme (`str`, defaults to `"nf4"`): one of `SCHEMES`.
        before ([`HeldOutLoss`], *optional*): of the model on this data, if it is known.
        batch_size (`int`, defaults to 8): rows a batch.

    Raises:
        ValueError: for an unknown scheme, or a model that is quantized already.
        MeasurementError: if quantization left a layer as it was.
        OSError: if there is no disk space for bitsandbytes' way through a saved model.
    """
    check_scheme(scheme)
    before = before or held_out_loss(model, data, batch_size=batch_size)
    with quantized(model, scheme) as (small, proof):
        after = held_out_loss(small, data, batch_size=batch_size)
    return QuantizationDamage(proof, before, after, forgetting(before, after))


@contextlib.contextmanager
def quantized(model: torch.nn.Module, scheme: str) -> Iterator[tuple[torch.nn.Module, Quantized]]:
    """Context manager: a quantized version of a model in memory.

    bitsandbytes quantizes while it loads, so the model is saved to a temporary folder and loaded from it; rounding to
    nearest happens in the model itself, which gets its weights back at the end.

    Raises:
        ValueError: for an unknown scheme, a model with adapters, or one that is quantized already.
    """
    check_scheme(scheme)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "A model with adapters is quantized without them. Merge them first: model.merge_and_unload(), on a copy if "
            "the adapters are still needed."
        )
    if not is_rounding(scheme):
        dtype = next(param.dtype for param in model.parameters() if param.is_floating_point())
        device = next(param.device for param in model.parameters())
        with saved(model) as folder:
            yield load_quantized(folder, scheme, dtype=dtype, device_map={"": device})
        return
    names = [name for name, _ in quantizable(model)]
    params = {name: param for name, param in model.named_parameters() if name in set(names)}
    with Displacement(model, params):
        yield model, round_to_nearest(model, int(scheme[3:]))


def load_quantized(
    path: str | Path, scheme: str, *, dtype: torch.dtype = torch.float32, device_map="cpu", **kwargs
) -> tuple[torch.nn.Module, Quantized]:
    """Load a causal language model quantized, and check that it is.

    Args:
        path (`str` or `Path`): folder or hub id.
        scheme (`str`): one of `SCHEMES`: `nf4` and `fp4` (QLoRA, arXiv 2305.14314; `-double` quantizes the scales,
            too), `int8` (LLM.int8(), arXiv 2208.07339), or `rtn4` and `rtn3`, rounding to nearest in groups of 128.
        dtype (`torch.dtype`, defaults to `torch.float32`): of what is not quantized, and of the computation.
        device_map (`str` or `dict`, defaults to `"cpu"`): where to load it.
        kwargs: further arguments of `from_pretrained`, e.g. `revision`.

    Raises:
        ValueError: for an unknown scheme, or a checkpoint that lacks weights.
        ImportError: if bitsandbytes is missing.
        MeasurementError: if loading left a layer in full precision.
    """
    check_scheme(scheme)
    if is_rounding(scheme):
        model = load_checked(path, dtype=dtype, device_map=device_map, **kwargs)
        return model, round_to_nearest(model, int(scheme[3:]))
    require("bitsandbytes", f"Quantization to {scheme}")
    if scheme == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme[:3],
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=scheme.endswith("-double"),
        )
    model = load_checked(path, dtype=dtype, device_map=device_map, quantization_config=config, **kwargs)
    if dtype == torch.float32:
        _compute_in_fp32(model)
    return model, check_quantized(model, scheme)


def load_source_quantized(
    source: LocalModel, scheme: str, dtype: torch.dtype, device_map="cpu"
) -> tuple[torch.nn.Module, Quantized]:
    """[`load_quantized`] of a model on disk; adapters are merged into a temporary copy first.

    Raises:
        OSError: if there is no disk space for the copy.
    """
    if source.base is None:
        return load_quantized(source.folder, scheme, dtype=dtype, device_map=device_map)
    with saved(source.load(dtype)) as folder:
        return load_quantized(folder, scheme, dtype=dtype, device_map=device_map)


def _compute_in_fp32(model: torch.nn.Module) -> None:
    """Turn off the fast path of bitsandbytes on CPUs with AVX-512, which always computes in bf16.

    Its rounding of activations is as large as what the rounding of weights does, and depends on the machine.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_rounding(scheme: str) -> bool:
    """Whether a scheme rounds a loaded model; bitsandbytes applies the others while loading."""
    return scheme.startswith("rtn")


def check_scheme(scheme: str) -> None:
    """Raises ValueError for an unknown scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"There is no quantization scheme {scheme!r}; choose one of {', '.join(SCHEMES)}.")


def check_quantized(model: torch.nn.Module, scheme: str) -> Quantized:
    """Check what bitsandbytes quantized in a model.

    Raises:
        MeasurementError: if nothing is quantized, a linear layer other than the output layer is not, or the scheme is
            another one.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear8bitLt if scheme == "int8" else Linear4bit
    heads = _embeddings(model)
    layers = bytes_after = weights = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or id(module) in heads:
            continue
        problem = None
        if not isinstance(module, kind):
            problem = f"is a {type(module).__name__}"
        elif scheme == "int8":
            if module.weight.dtype != torch.int8:
                problem = f"holds {module.weight.dtype}"
            scales = module.state.SCB if module.weight.__dict__.get("SCB") is None else module.weight.SCB
            count, size = module.weight.numel(), module.weight.nbytes + (0 if scales is None else scales.nbytes)
        else:
            state = module.weight.quant_state
            if module.weight.dtype != torch.uint8 or state is None:
                problem = f"holds {module.weight.dtype}"
            elif state.quant_type != scheme[:3] or state.nested != scheme.endswith("-double"):
                problem = f"is quantized to {state.quant_type}{'-double' if state.nested else ''}"
            else:
                count = state.shape.numel()
                size = module.weight.nbytes + state.absmax.nbytes
                size += state.state2.absmax.nbytes if state.nested else 0
                if module.weight.nbytes != -(-count // 2):
                    problem = f"takes {module.weight.nbytes} bytes for {count} weights"
        if problem:
            raise MeasurementError(f"Quantization to {scheme} failed silently: {name!r} {problem}.")
        layers, weights, bytes_after = layers + 1, weights + count, bytes_after + size
    left = {name: param.numel() for name, param in quantizable(model) if param.is_floating_point()}
    if sum(left.values()) > _LEFT * (weights + sum(left.values())):
        raise MeasurementError(
            f"Quantization to {scheme} failed silently: bitsandbytes left {sum(left.values())} of the weights of "
            f"{type(model).__name__} in full precision, such as {next(iter(left))!r}, because they are in no linear "
            "layer. Use rtn4 or rtn3."
        )
    return Quantized(scheme, layers, weights, 2 * weights, bytes_after)


def quantizable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights that rounding to nearest quantizes: all matrices and stacks of matrices (experts) except embeddings."""
    heads = _embeddings(model)
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or id(module) in heads:
            seen.update(id(param) for param in module.parameters(recurse=False))
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.dim() >= 2 and id(param) not in seen:
                seen.add(id(param))
                yield f"{prefix}.{name}" if prefix else name, param


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int, group_size: int = 128) -> Quantized:
    """Round the weights of a model in place to 2**bits evenly spaced values in each group, and check that it did.

    Asymmetric, from the smallest to the largest weight of a group (0 included); groups lie along the input dimension,
    the last one of a row may be smaller. A scale of 16 bits and a zero point of `bits` bits belong to each group.

    Args:
        model (`torch.nn.Module`): in floating point; its embeddings and output layer stay as they are.
        bits (`int`): from 2 to 8.
        group_size (`int`, defaults to 128): weights that share a scale.

    Raises:
        ValueError: if `bits` or `group_size` is out of range, or the model is quantized already.
        MeasurementError: if the model has nothing to quantize, or keeps more values than it should.
    """
    if not 2 <= bits <= 8 or group_size < 1:
        raise ValueError(f"bits={bits} must be from 2 to 8, and group_size={group_size} positive.")
    layers = weights = size = 0
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for name, param in quantizable(model):
        if not param.is_floating_point():
            raise ValueError(f"{name!r} holds {param.dtype}: the model is quantized already.")
        matrix = param.transpose(0, 1) if id(param) in transposed else param
        rounded, groups = _rounded(matrix, bits, group_size)
        matrix.copy_(rounded)
        layers, weights = layers + 1, weights + param.numel()
        size += -(-(param.numel() * bits + groups * (16 + bits)) // 8)
        first = matrix.reshape(-1, matrix.shape[-1])[0, :group_size]
        if len(first.unique()) > 2**bits:
            raise MeasurementError(
                f"Rounding to {bits} bits failed: {name!r} holds {len(first.unique())} values a group."
            )
    if not layers:
        raise MeasurementError(f"{type(model).__name__} has no weight matrix to quantize besides its embeddings.")
    return Quantized(f"rtn{bits}", layers, weights, 2 * weights, size)


def _rounded(matrix: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, int]:
    columns, groups = [], 0
    top = 2**bits - 1
    for piece in matrix.float().split(group_size, dim=-1):
        low, high = piece.amin(-1, keepdim=True).clamp(max=0), piece.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-30)
        zero = (-low / scale).round()
        columns.append((((piece / scale).round() + zero).clamp(0, top) - zero) * scale)
        groups += low.numel()
    return torch.cat(columns, dim=-1), groups


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


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Ids of the modules that stay in full precision: input and output embeddings."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError, AttributeError):
            found.add(id(getattr(model, getter)()))
    # As in transformers: without output embeddings, the last linear layer, e.g. a classification head.
    if model.get_output_embeddings() is None if hasattr(model, "get_output_embeddings") else True:
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        found.update(id(module) for module in linears[-1:])
    return found
