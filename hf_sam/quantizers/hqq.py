"""HQQ: half-quadratic quantization (Badri and Shaji, 2023), which fits the zero points and needs no calibration data.

Groups of 64 weights, asymmetric, by the package of its authors.
"""

import functools

import torch

from .proof import linear_layers
from .registry import Held, Quantizer, register

_GROUP_SIZE = 64


def _apply(model: torch.nn.Module, bits: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, layer in linear_layers(model).items():
        config = BaseQuantizeConfig(nbits=bits, group_size=_GROUP_SIZE)
        weight = layer.weight
        made = HQQLinear(layer, config, compute_dtype=weight.dtype, device=str(weight.device))
        model.set_submodule(name, made)


def held(module: torch.nn.Module, name: str, bits: int | None = None) -> Held | str:
    """What a layer of HQQ holds, of any number of bits when omitted; see [`Quantizer`]."""
    if type(module).__name__ != "HQQLinear":
        return f"is a {type(module).__name__}"
    made = module.meta["nbits"]
    if bits not in (None, made):
        return f"is quantized to {made} bits"
    if module.W_q.is_floating_point():
        return f"holds {module.W_q.dtype}"
    scales = [module.meta[part] for part in ("scale", "zero") if torch.is_tensor(module.meta.get(part))]
    return Held("HQQLinear", module.W_q.nbytes + sum(one.nbytes for one in scales))


for _bits in (8, 4, 3, 2):
    register(
        Quantizer(
            scheme=f"hqq{_bits}",
            help=f"HQQ, {_bits} bits in groups of {_GROUP_SIZE}",
            held=functools.partial(held, bits=_bits),
            apply=functools.partial(_apply, bits=_bits),
            packages=("hqq",),
        )
    )
