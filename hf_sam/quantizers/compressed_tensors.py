"""llm-compressor: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), in the compressed-tensors format of vLLM.

Both calibrate on data. The quantized model is saved and loaded again, so that what is measured is what would be
deployed. transformers then holds the rounded values in the old type; the bytes are those of the file.
"""

import functools
import tempfile
from pathlib import Path

import torch

from ..instruments.documents import HeldOutData
from ..runtime.disk import check_disk
from ..runtime.models import load_checked
from .proof import linear_layers
from .registry import Held, Quantizer, register

# Rows of calibration data: what GPTQ and AWQ of llm-compressor use in its examples.
CALIBRATION_ROWS = 512

# Architectures that llm-compressor has no smoothing layers for, and another of theirs with the same layers.
_LIKE = {"Olmo2ForCausalLM": "Olmo3ForCausalLM"}


def _load(path, *, method: str, dtype: torch.dtype, device_map, calibration: HeldOutData, **kwargs) -> torch.nn.Module:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    model = load_checked(path, dtype=dtype, device_map=device_map, **kwargs)
    skipped = _skipped(model)
    recipe = _gptq(skipped) if method == "gptq4" else _awq(model, skipped)
    rows = [torch.tensor([row.input_ids]) for row in calibration.rows[:CALIBRATION_ROWS]]
    oneshot(
        model=model,
        dataset=DataLoader(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=None
        ),
        recipe=recipe,
        processor=object(),  # of text; the rows are tokens
        num_calibration_samples=len(rows),
        max_seq_length=max(row.shape[1] for row in rows),
    )
    needed = sum(param.nbytes for param in model.parameters())
    check_disk(tempfile.gettempdir(), needed, "the quantized model (set TMPDIR to another disk)")
    with tempfile.TemporaryDirectory(prefix="hf-sam-") as folder:
        model.save_pretrained(folder)
        del model
        return load_checked(Path(folder), dtype=dtype, device_map=device_map)


def _skipped(model: torch.nn.Module) -> list[str]:
    """Names of linear layers that stay in full precision."""
    chosen = linear_layers(model)
    return [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and n not in chosen]


def _gptq(skipped: list[str]) -> list:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return [GPTQModifier(targets="Linear", scheme="W4A16", ignore=skipped)]


def _awq(model: torch.nn.Module, skipped: list[str]) -> list:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY

    like = _LIKE.get(type(model).__name__)
    known = {"mappings": AWQ_MAPPING_REGISTRY[like]} if like else {}
    return [AWQModifier(**known), QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=skipped)]


def held(module: torch.nn.Module, name: str, bits: int | None = None) -> Held | str:
    """What a layer in the compressed-tensors format holds, of any number of bits when omitted; see [`Quantizer`]."""
    scheme = getattr(module, "quantization_scheme", None)
    arguments = getattr(scheme, "weights", None)
    if arguments is None:
        weight = getattr(module, name, None)
        return f"is a {type(module).__name__} that holds {'nothing' if weight is None else weight.dtype}"
    if bits not in (None, arguments.num_bits):
        return f"is quantized to {arguments.num_bits} bits"
    number = getattr(arguments.type, "value", arguments.type)  # an enumeration or, read from a file, its value
    kind = f"{number}{arguments.num_bits} of compressed-tensors"
    scales = [getattr(module, part) for part in ("weight_scale", "weight_zero_point") if hasattr(module, part)]
    if hasattr(module, "weight_packed"):
        return Held(kind, module.weight_packed.nbytes + sum(one.nbytes for one in scales))
    if not scales:
        return f"is a {type(module).__name__} without scales"
    # Unpacked by transformers: the rounded values.
    matrix, scale = getattr(module, name).detach(), scales[0].detach()
    if not _on_grid(matrix, scale, getattr(module, "weight_g_idx", None), whole=number == "int"):
        return f"holds values that {arguments.num_bits} bits with its scales cannot"
    size = matrix.numel() * arguments.num_bits // 8 + 2 * scale.numel()
    return Held(kind, size if arguments.symmetric else size + scale.numel() * arguments.num_bits // 8)


def _on_grid(matrix: torch.Tensor, scale: torch.Tensor, order: torch.Tensor | None, whole: bool) -> bool:
    """Whether weights are what codes of few bits times their scales give: whole multiples of them, or float8 values."""
    matrix, scale = matrix.float(), scale.float().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
    if matrix.shape[0] % len(scale) or (order is None and matrix.shape[1] % scale.shape[1]):
        return False
    scale = scale.repeat_interleave(matrix.shape[0] // len(scale), dim=0)  # blocks, or one for all rows
    columns = (
        scale[:, order.long()]
        if order is not None
        else scale.repeat_interleave(matrix.shape[1] // scale.shape[1], dim=1)
    )
    codes = matrix / columns.clamp(min=1e-30)
    # Weights in 16 bits are rounded once more.
    if whole:
        return bool(((codes - codes.round()).abs() <= 0.01 + codes.abs() / 128).all())
    return bool(((codes - codes.to(torch.float8_e4m3fn).float()).abs() <= 0.01 + codes.abs() / 128).all())


def _awq_problem(device: str) -> str | None:
    return "awq4 of llm-compressor pins memory for an accelerator, and there is none" if device == "cpu" else None


for _scheme, _name in {"gptq4": "GPTQ", "awq4": "AWQ"}.items():
    register(
        Quantizer(
            scheme=_scheme,
            help=f"{_name}, 4 bits in groups of 128, llm-compressor; needs --calibration_data",
            held=functools.partial(held, bits=4),
            load=functools.partial(_load, method=_scheme),
            calibrated=True,
            packages=("llmcompressor",),
            problem=_awq_problem if _scheme == "awq4" else lambda device: None,
        )
    )
