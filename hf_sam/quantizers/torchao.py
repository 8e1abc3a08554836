"""torchao: weight-only quantization to int4, int8 and float8, with activations in full precision.

int4 is the configuration that ExecuTorch and vLLM users deploy: groups of 128 weights, asymmetric (tinygemm). On a CPU
it takes torchao's layout for CPUs.
"""

import functools

import torch

from ..runtime.errors import MeasurementError
from .proof import linear_layers
from .registry import Held, Quantizer, register

# The type of the packed numbers, and how many of them are in one.
_PACKED = {
    "torchao-int4": {torch.uint8: 2, torch.int32: 8},
    "torchao-int8": {torch.int8: 1},
    "torchao-fp8": {torch.float8_e4m3fn: 1},
}
_GROUP_SIZES = (128, 64, 32)


def _apply(model: torch.nn.Module, scheme: str) -> None:
    from torchao.quantization import quantize_

    layers = linear_layers(model)
    if not layers:
        return  # the proof says so
    chosen = {id(layer) for layer in layers.values()}
    quantize_(model, _config(scheme, list(layers.values())), filter_fn=lambda module, name: id(module) in chosen)


def _config(scheme: str, layers: list[torch.nn.Linear]):
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if scheme == "torchao-int8":
        return Int8WeightOnlyConfig()
    if scheme == "torchao-fp8":
        return Float8WeightOnlyConfig()
    widths = {layer.in_features for layer in layers}
    group = next((size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise MeasurementError(
            f"torchao-int4 needs layers whose inputs are a multiple of {_GROUP_SIZES[-1]}; this model has "
            f"{', '.join(map(str, sorted(widths)))}. Use hqq4 or rtn4."
        )
    if layers[0].weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    if layers[0].weight.dtype != torch.bfloat16:
        raise MeasurementError("torchao-int4 computes in bf16 on a GPU: measure with --dtype bfloat16.")
    return Int4WeightOnlyConfig(group_size=group, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")


def held(module: torch.nn.Module, name: str, scheme: str | None = None) -> Held | str:
    """What a layer with a tensor of torchao holds, of any scheme when omitted; see [`Quantizer`]."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return f"has no {name}"
    kind = type(tensor.data).__name__
    if not hasattr(tensor, "__tensor_flatten__") or not hasattr(tensor, "qdata"):
        return f"is a {type(module).__name__} that holds {tensor.dtype}"
    packed = _PACKED[scheme] if scheme else {dtype: 1 for known in _PACKED.values() for dtype in known}
    if tensor.qdata.dtype not in packed:
        return f"holds a {kind} of {tensor.qdata.dtype}"
    if scheme and tensor.qdata.numel() * packed[tensor.qdata.dtype] != tensor.numel():
        return f"takes {tensor.qdata.nbytes} bytes for {tensor.numel()} weights"
    inner = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
    return Held(kind, sum(one.nbytes for one in inner))


for _scheme, _help in {
    "torchao-int4": "int4 weights in groups of 128, torchao",
    "torchao-int8": "int8 weights with a scale a row, torchao",
    "torchao-fp8": "float8 (e4m3) weights with a scale a row, torchao",
}.items():
    register(
        Quantizer(
            scheme=_scheme,
            help=_help,
            held=functools.partial(held, scheme=_scheme),
            apply=functools.partial(_apply, scheme=_scheme),
            packages=("torchao",),
        )
    )
