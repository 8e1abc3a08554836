"""Models that somebody else quantized: checkpoints that transformers loads (GPTQ, AWQ, bitsandbytes, torchao,
compressed-tensors, FP8, ...) and GGUF files, with the same proof as for the schemes of this library.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from ..runtime.errors import MeasurementError
from ..runtime.fingerprint import fingerprint_of_files
from ..runtime.models import LocalModel, check_same_tokens, find_model, load_checked, model_without_weights
from ..runtime.packages import require
from . import bitsandbytes, compressed_tensors, gguf, hqq, torchao
from .loading import device_type
from .proof import Quantized, matrices_of_config, prove, prove_held
from .registry import Held

# Packages that transformers needs for a method of quantization, by the name in config.json.
_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "quanto": "optimum",
    "hqq": "hqq",
}

# Share of the tokens of a GGUF file that may be written in another way than in the tokenizer.
_OTHER_TOKENS = 0.01

# A layer counts as quantized if it takes less than this many bytes a weight; 16 bits take 2.
_BYTES = 1.5


@dataclass(frozen=True)
class ReadyMade:
    """A model that somebody else quantized.

    Attributes:
        scheme (`str`): name in tables.
        model (`LocalModel`): the model in full precision that it was made from.
        spec (`str`): folder, file or Hub id that the user gave.
        path (`Path`): the folder, or the GGUF file.
        fingerprint (`str`): fingerprint of its weights.
        packages (`tuple[str, ...]`): packages that its losses depend on.
    """

    scheme: str
    model: LocalModel
    spec: str
    path: Path
    fingerprint: str
    packages: tuple[str, ...] = ()


def find_ready_made(scheme: str, place: str, model: LocalModel) -> ReadyMade:
    """Find a model that somebody else quantized, and check that it can be evaluated beside `model`.

    Args:
        scheme (`str`): its name in tables.
        place (`str`): a folder, `HUB/ID[@REVISION]`, or a GGUF file: `PATH.gguf` or `HUB/ID/FILE.gguf[@REVISION]`.
        model (`LocalModel`): the model in full precision that it was made from.

    Raises:
        ValueError: if there is no such model, it is not quantized, or has another vocabulary.
        ImportError: if a package is missing.
    """
    if place.partition("@")[0].endswith(".gguf"):
        for package in ("gguf", "llama_cpp"):
            require(package, f"The GGUF file {place!r}")
        if re.search(r"-\d{5}-of-\d{5}\.gguf$", place.partition("@")[0]):
            raise ValueError(f"{place!r} is one part of a model. Merge the parts first: llama-gguf-split --merge.")
        path = gguf.find_gguf(place)
        _check_vocabulary(gguf.GGUFHeader(path).tokens(), model, place)
        return ReadyMade(scheme, model, place, path, fingerprint_of_files([path], path.parent), ("llama_cpp_python",))
    found = find_model(place)
    config = {} if found.base is not None else json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    made = config.get("quantization_config") or config.get("compression_config")
    if not made:
        raise ValueError(
            f"{place!r} is not quantized: its config.json has no quantization_config. --quantized takes models that "
            "are; --quantize quantizes others."
        )
    method = str(made.get("quant_method", ""))
    if method in _PACKAGES:
        require(_PACKAGES[method], f"{place!r}, which is quantized by {method},")
    if any((found.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        check_same_tokens(model.tokenizer(), found.tokenizer(), scheme)
    packages = (_PACKAGES[method],) if method in _PACKAGES else ()
    return ReadyMade(scheme, model, place, found.folder, found.fingerprint, packages)


def load_ready_made(
    made: ReadyMade, dtype: torch.dtype = torch.float32, device_map="cpu"
) -> tuple[torch.nn.Module, Quantized]:
    """Load a model that somebody else quantized, and check that it is.

    Args:
        made ([`ReadyMade`]): from [`find_ready_made`].
        dtype (`torch.dtype`, defaults to `torch.float32`): of what is not quantized.
        device_map (`str` or `dict`, defaults to `"cpu"`): where to load it.

    Raises:
        MeasurementError: if less than half of its weights are quantized, or it does not fit the model in full
            precision.
    """
    folder = (made.model.base or made.model).folder
    if made.path.is_file():
        model = gguf.GGUFForCausalLM(
            made.path, AutoConfig.from_pretrained(folder), dtype, gpu=device_type(device_map) != "cpu"
        ).eval()
        header = gguf.GGUFHeader(made.path)
        proof = prove_held(made.path.name, made.scheme, header.matrices(), header.held(), whole=False)
        plain = sum(matrix.weights for matrix in matrices_of_config(folder).values())
        if abs(proof.weights + proof.left - plain) > 0.01 * plain:
            raise MeasurementError(
                f"{made.spec!r} has {proof.weights + proof.left:,} weights besides its embeddings, but "
                f"{made.model.name!r} has {plain:,}: it was made from another model."
            )
        return model, _with_difference(proof, folder, header.embeddings())
    model = load_checked(made.path, dtype=dtype, device_map=device_map)
    if dtype == torch.float32:
        bitsandbytes.compute_in_fp32(model)
    proof = prove(model, made.scheme, matrices_of_config(folder), what_it_holds, whole=False)
    return model.eval(), _with_difference(proof, folder, model.get_input_embeddings().weight.detach())


def _with_difference(proof: Quantized, folder: Path, embeddings: torch.Tensor | None) -> Quantized:
    """The proof with the difference between these embeddings and those of the plain model in a folder.

    It tells whether the quantized model was made from that one: quantizers leave embeddings alone, or nearly so.
    """
    plain = _embeddings_of(folder)
    if plain is None or embeddings is None or not embeddings.is_floating_point():
        return proof
    if plain.shape[1] != embeddings.shape[1]:
        raise MeasurementError(
            f"{proof.scheme} has embeddings of {embeddings.shape[1]} numbers, but those of the model in full precision "
            f"have {plain.shape[1]}: it was made from another model."
        )
    rows = min(len(plain), len(embeddings))  # one of them may be padded
    plain, embeddings = plain[:rows], embeddings[:rows]
    plain = plain.to(embeddings.device, torch.float32)
    difference = (embeddings.float() - plain).norm() / plain.norm()
    return dataclasses.replace(proof, embedding_difference=round(float(difference), 6))


def _embeddings_of(folder: Path) -> torch.Tensor | None:
    from safetensors import safe_open

    model = model_without_weights(folder)
    name = next(n for n, param in model.named_parameters() if param is model.get_input_embeddings().weight)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    return None


def what_it_holds(module: torch.nn.Module, name: str) -> Held | str:
    """What a layer holds, by whatever package it was quantized; see [`Quantizer`](~hf_sam.quantizers.Quantizer)."""
    for known in (_of_bitsandbytes, torchao.held, hqq.held):
        found = known(module, name)
        if isinstance(found, Held):
            return found
    if hasattr(module, "quantization_scheme"):
        return compressed_tensors.held(module, name)
    kind = type(module).__name__
    tensors = [one for own, one in _tensors(module) if own != "bias"]
    size = sum(one.nbytes for one in tensors)
    weights = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
    if not weights and getattr(module, name, None) is not None:
        weights = getattr(module, name).numel()
    if weights and 0 < size < _BYTES * weights:
        return Held(kind, size)
    return f"is a {kind} of {size} bytes"


def _of_bitsandbytes(module: torch.nn.Module, name: str) -> Held | str:
    return bitsandbytes.held(module, name) if type(module).__module__.startswith("bitsandbytes") else "is another"


def _tensors(module: torch.nn.Module):
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_vocabulary(tokens: list[str], model: LocalModel, place: str) -> None:
    known = model.tokenizer().get_vocab()
    # Converters write some added tokens in another way, e.g. with spaces.
    plain = [token.replace("\u2581", " ") for token in tokens]
    different = [token for token, n in known.items() if n >= len(plain) or plain[n] != token.replace("\u2581", " ")]
    if tokens and len(different) > _OTHER_TOKENS * len(known):
        raise ValueError(
            f"The vocabularies of {place!r} and of {model.name!r} differ: {len(different)} of {len(known)} tokens, "
            f"such as {different[0]!r}, have another id or none. Losses per token of the two cannot be compared."
        )
