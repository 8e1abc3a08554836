"""The proof that a model is quantized: layer types, data types and bytes of every weight matrix.

A model that silently stayed in full precision shows no damage at all. What should be quantized is read from the plain
model, so that a layer which a package skipped, or replaced by something else, is noticed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..runtime.errors import MeasurementError
from ..runtime.models import model_without_weights
from .registry import Held

# Share of the weights that may stay in full precision, e.g. the kernels of short convolutions.
_LEFT = 0.05


@dataclass(frozen=True)
class Quantized:
    """What was quantized in a model.

    Attributes:
        scheme (`str`): name of the scheme.
        layers (`int`): quantized weight matrices, or stacks of matrices.
        weights (`int`): numbers in them.
        bytes_before, bytes_after (`int`): bytes of those matrices in 16 bits, and now, scales included. (Where weights
            keep their type and only their values are rounded, what they would take.)
        kinds (`tuple[str, ...]`): types of the quantized layers, or of their tensors.
        left (`int`): numbers in weight matrices that stayed in full precision, without embeddings and output layer.
        embedding_difference (`float` or `None`): for a model that somebody else quantized, how far its input embeddings
            are from those of the model that it is compared with, relative to these; None if not known.
    """

    scheme: str
    layers: int
    weights: int
    bytes_before: int
    bytes_after: int
    kinds: tuple[str, ...] = ()
    left: int = 0
    embedding_difference: float | None = None

    @property
    def bits(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * self.bytes_after / self.weights

    def to_dict(self) -> dict:
        """For JSON."""
        return {**vars(self), "kinds": list(self.kinds), "bits": self.bits}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the plain model.

    Attributes:
        weights (`int`): numbers in it.
        linear (`bool`): whether it is the weight of a linear layer.
    """

    weights: int
    linear: bool


def matrices(model: torch.nn.Module) -> dict[str, Matrix]:
    """The weight matrices of a plain model that a quantizer should quantize, by name."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: Matrix(param.numel(), name in linear) for name, param in quantizable(model)}


def matrices_of_config(path, **kwargs) -> dict[str, Matrix]:
    """[`matrices`] of a saved model, from its config; `kwargs` are those of `AutoConfig.from_pretrained`."""
    return matrices(model_without_weights(path, **kwargs))


def quantizable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights to quantize: all matrices and stacks of matrices (experts) except embeddings and the output layer."""
    heads = kept_whole(model)
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or id(module) in heads:
            seen.update(id(param) for param in module.parameters(recurse=False))
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.dim() >= 2 and id(param) not in seen:
                seen.add(id(param))
                yield f"{prefix}.{name}" if prefix else name, param


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers to quantize, by name: all except the output layer."""
    heads = kept_whole(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in heads
    }


def kept_whole(model: torch.nn.Module) -> set[int]:
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


def prove(
    model: torch.nn.Module,
    scheme: str,
    plain: dict[str, Matrix],
    held: Callable[[torch.nn.Module, str], Held | str],
    *,
    whole: bool = True,
) -> Quantized:
    """Check what is quantized in a model.

    Args:
        model (`torch.nn.Module`): the quantized model.
        scheme (`str`): for messages and the result.
        plain (`dict[str, Matrix]`): what should be quantized, from [`matrices`].
        held (`Callable`): see [`Quantizer`](~hf_sam.quantizers.Quantizer).
        whole (`bool`, defaults to `True`): see [`prove_held`].

    Raises:
        MeasurementError: see [`prove_held`].
    """
    found = {}
    for name in plain:
        prefix, _, own = name.rpartition(".")
        try:
            module = model.get_submodule(prefix)
        except AttributeError as error:
            raise MeasurementError(
                f"{type(model).__name__} of {scheme} has no {prefix!r}: it was made from another model."
            ) from error
        else:
            found[name] = held(module, own)
    return prove_held(type(model).__name__, scheme, plain, found, whole=whole)


def prove_held(
    model: str, scheme: str, plain: dict[str, Matrix], found: dict[str, Held | str], *, whole: bool = True
) -> Quantized:
    """Check what the weight matrices of a model hold.

    Args:
        model (`str`): name of the model, for messages.
        scheme (`str`): for messages and the result.
        plain (`dict[str, Matrix]`): what should be quantized.
        found (`dict[str, Held | str]`): what holds it, or words such as `"is a Linear"`, by the same names.
        whole (`bool`, defaults to `True`): every linear layer must be quantized. Otherwise, as for a model that
            somebody else quantized, half of the weights suffices; the others are counted in `left`.

    Raises:
        MeasurementError: if nothing is quantized, or less than that.
    """
    if not plain:
        raise MeasurementError(f"{model} has no weight matrix to quantize besides its embeddings.")
    quantized = {name: what for name, what in found.items() if isinstance(what, Held)}
    left = [name for name in plain if name not in quantized]
    for name in left:
        if whole and plain[name].linear:
            layer = name.rpartition(".")[0]
            raise MeasurementError(f"Quantization to {scheme} failed silently: {layer!r} {found[name]}.")
    weights, still = (sum(plain[name].weights for name in names) for names in (quantized, left))
    if still > (_LEFT if whole else 0.5) * (weights + still):
        remedy = "Rounding (rtn4) covers all kinds of layers." if whole else "Is that model quantized?"
        raise MeasurementError(
            f"Quantization to {scheme} failed silently: {still} of the {weights + still} weights of {model} are in "
            f"full precision, such as {left[0]!r}, which {found[left[0]]}. {remedy}"
        )
    return Quantized(
        scheme,
        layers=len(quantized),
        weights=weights,
        bytes_before=2 * weights,
        bytes_after=sum(what.bytes for what in quantized.values()),
        kinds=tuple(dict.fromkeys(what.kind for what in quantized.values())),
        left=still,
    )
