"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv 2305.14314), and INT8 (LLM.int8(), arXiv 2208.07339).

FP4 is what `load_in_4bit=True` gives without further options. `-double` quantizes the scales, too. INT8 also rounds
activations, except in columns of a batch with a large one, so its losses depend slightly on the batch.
"""

import functools

import torch
from transformers import BitsAndBytesConfig

from ..runtime.models import load_checked
from .registry import Held, Quantizer, register


def _load(path, *, scheme: str, dtype: torch.dtype, device_map, **kwargs) -> torch.nn.Module:
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
        compute_in_fp32(model)
    return model


def compute_in_fp32(model: torch.nn.Module) -> None:
    """Turn off the fast path of bitsandbytes on CPUs with AVX-512, which always computes in bf16.

    Its rounding of activations is as large as what the rounding of weights does, and depends on the machine.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def held(module: torch.nn.Module, name: str, scheme: str | None = None) -> Held | str:
    """What a layer of bitsandbytes holds, of any scheme when omitted; see [`Quantizer`]."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = type(module).__name__
    if isinstance(module, Linear8bitLt) and scheme in (None, "int8"):
        if module.weight.dtype != torch.int8:
            return f"holds {module.weight.dtype}"
        scales = module.state.SCB if module.weight.__dict__.get("SCB") is None else module.weight.SCB
        return Held(kind, module.weight.nbytes + (0 if scales is None else scales.nbytes))
    if not isinstance(module, Linear4bit) or scheme == "int8":
        return f"is a {kind}"
    state = module.weight.quant_state
    if module.weight.dtype != torch.uint8 or state is None:
        return f"holds {module.weight.dtype}"
    made = f"{state.quant_type}{'-double' if state.nested else ''}"
    if scheme not in (None, made):
        return f"is quantized to {made}"
    if module.weight.nbytes != -(-state.shape.numel() // 2):
        return f"takes {module.weight.nbytes} bytes for {state.shape.numel()} weights"
    size = module.weight.nbytes + state.absmax.nbytes
    return Held(kind, size + (state.state2.absmax.nbytes if state.nested else 0))


_HELP = {
    "nf4": "NormalFloat of 4 bits in groups of 64",
    "nf4-double": "NF4 with quantized scales",
    "fp4": "what load_in_4bit=True gives",
    "fp4-double": "FP4 with quantized scales",
    "int8": "LLM.int8()",
}
for _scheme, _help in _HELP.items():
    register(
        Quantizer(
            scheme=_scheme,
            help=f"{_help}, bitsandbytes",
            held=functools.partial(held, scheme=_scheme),
            load=functools.partial(_load, scheme=_scheme),
            packages=("bitsandbytes",),
        )
    )
