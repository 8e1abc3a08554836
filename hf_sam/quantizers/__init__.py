"""Quantizers: what people deploy, each with the proof that a model really is quantized.

- measure: [`quantization_damage`]; from the command line, `hf-sam evaluate --quantize SCHEME ...`
- quantize: [`quantized`] (in memory), [`load_quantized`] (while loading), [`round_to_nearest`] (in place)
- a scheme of your own: [`Quantizer`], [`register`]; those that are registered are in `QUANTIZERS`
- models that somebody else quantized, GGUF files included: [`load_ready_made`]; `hf-sam evaluate --quantized`
"""

# Flags and reports show schemes in the order of these imports.
# isort: off
from . import bitsandbytes  # noqa: F401
from .rounding import round_to_nearest
from . import torchao  # noqa: F401
from . import hqq  # noqa: F401
from . import compressed_tensors  # noqa: F401

# isort: on
from .damage import QuantizationDamage, quantization_damage
from .loading import load_quantized, quantized
from .proof import Quantized
from .ready_made import load_ready_made
from .registry import QUANTIZERS, Held, Quantizer, register

__all__ = [
    "QUANTIZERS",
    "Held",
    "QuantizationDamage",
    "Quantized",
    "Quantizer",
    "load_quantized",
    "load_ready_made",
    "quantization_damage",
    "quantized",
    "register",
    "round_to_nearest",
]
