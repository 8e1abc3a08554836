"""The registry of quantizers: what `--quantize` of `hf-sam evaluate` and [`quantization_damage`] know.

A scheme is one [`Quantizer`], which a file of this package registers. Flags, checks, the proof that a model really is
quantized, tables and comparisons follow from its fields; no other file names it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Held:
    """What the layer of a quantized weight matrix holds.

    Attributes:
        kind (`str`): type of the layer or of its tensor, e.g. `"Linear4bit"`.
        bytes (`int`): bytes of the quantized matrix, scales and zero points included.
    """

    kind: str
    bytes: int


@dataclass(frozen=True)
class Quantizer:
    """A quantization scheme. It has either `apply` or `load`.

    Attributes:
        scheme (`str`): value of the flag, and name in tables, e.g. `"nf4"`.
        help (`str`): a few words for `--help`, with its source.
        held (`Callable[[torch.nn.Module, str], Held | str]`): what a layer holds, from the layer and the name of its
            weight; words such as `"is a Linear"` if that is not what this scheme makes of it.
        apply (`Callable[[torch.nn.Module], None]`): quantizes a model in place; embeddings and output layer
            ([`kept_whole`](~hf_sam.quantizers.proof.kept_whole)) stay as they are.
        load (`Callable[..., torch.nn.Module]`): loads a saved model quantized: `load(path, dtype=..., device_map=...,
            **kwargs)` with further arguments of `from_pretrained`, and `calibration` for a calibrated scheme.
        simulated (`bool`): whether `apply` only changes the values of weights, which keep their type.
        calibrated (`bool`): whether it needs calibration data.
        packages (`tuple[str, ...]`): optional packages that it needs.
        problem (`Callable[[str], str | None]`): why it cannot run on a type of device (`"cpu"`, `"cuda"`), or None.
    """

    scheme: str
    help: str
    held: Callable[[torch.nn.Module, str], Held | str]
    apply: Callable[[torch.nn.Module], None] | None = None
    load: Callable[..., torch.nn.Module] | None = None
    simulated: bool = False
    calibrated: bool = False
    packages: tuple[str, ...] = ()
    problem: Callable[[str], str | None] = lambda device: None

    @property
    def through_disk(self) -> bool:
        """Whether it reads a saved model; a model in memory is saved to a temporary folder first."""
        return self.load is not None


QUANTIZERS: dict[str, Quantizer] = {}


def register(quantizer: Quantizer) -> Quantizer:
    """Make a quantizer known by its scheme; returns it.

    Raises:
        ValueError: if another quantizer has that scheme, or this one has both `apply` and `load`, or neither.
    """
    if (quantizer.apply is None) == (quantizer.load is None):
        raise ValueError(f"The quantizer {quantizer.scheme!r} needs either `apply` or `load`.")
    if QUANTIZERS.get(quantizer.scheme, quantizer) is not quantizer:
        raise ValueError(f"There is already a quantizer {quantizer.scheme!r}.")
    QUANTIZERS[quantizer.scheme] = quantizer
    return quantizer


def find_quantizer(scheme: str) -> Quantizer:
    """The quantizer of a scheme.

    Raises:
        ValueError: for an unknown scheme.
    """
    if scheme not in QUANTIZERS:
        raise ValueError(f"There is no quantization scheme {scheme!r}; choose one of {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[scheme]
