"""GGUF files, evaluated by llama.cpp, as llama.cpp, Ollama and LM Studio run them.

llama.cpp also rounds activations to 8 bits where a weight is quantized, and quantizes the embeddings, so the damage is
that of the file as it is deployed. In fp32 evaluations the key-value cache is kept in fp32.
"""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..runtime.errors import MeasurementError
from ..runtime.models import hub_errors
from .proof import Matrix
from .registry import Held

# Longest context; llama-cpp-python keeps logits for all of its tokens.
_MAX_CONTEXT = 4096
_FULL_PRECISION = ("F32", "F16", "BF16", "F64")
_EMBEDDINGS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")


class GGUFForCausalLM(PreTrainedModel):
    """A GGUF file as a model of transformers: the forward pass is that of llama.cpp, a row at a time, on its device.

    Args:
        path (`str` or `Path`): the file.
        config ([`~transformers.PretrainedConfig`]): of the model that the file was made from.
        dtype (`torch.dtype`): precision of the key-value cache, fp32 or 16 bits.
        gpu (`bool`, defaults to `False`): compute on the GPU, if llama.cpp was built for it.

    Raises:
        ValueError: if llama.cpp cannot load the file.
    """

    config_class = AutoConfig

    def __init__(self, path: str | Path, config, dtype: torch.dtype, gpu: bool = False):
        from gguf import GGMLQuantizationType
        from llama_cpp import Llama

        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        context = min(longest or _MAX_CONTEXT, _MAX_CONTEXT)
        super().__init__(config)
        self.config.max_position_embeddings = context
        cache = int(GGMLQuantizationType.F32 if dtype == torch.float32 else GGMLQuantizationType.F16)
        # What other instruments ask a model for: its device.
        self.anchor = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self._llama = Llama(
            str(path),
            n_ctx=context,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=-1 if gpu else 0,
            logits_all=True,
            type_k=cache,
            type_v=cache,
            verbose=False,
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        """Logits, shape `(rows, length, vocabulary)`; those of padding are 0."""
        rows, length = input_ids.shape
        logits = torch.zeros(rows, length, self._llama.n_vocab())
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, real) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens = ids[real].tolist()
            if not tokens:
                continue
            if len(tokens) > self._llama.n_ctx():
                raise MeasurementError(
                    f"A GGUF file is evaluated on rows of up to {self._llama.n_ctx()} tokens, but one has "
                    f"{len(tokens)}: set --max_length {self._llama.n_ctx()}."
                )
            self._llama.reset()
            self._llama.eval(tokens)
            logits[row, real] = torch.from_numpy(self._llama.scores[: len(tokens)].copy())
        return CausalLMOutput(logits=logits)

    def generate(self, *args, **kwargs):
        """Not supported.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError("Benchmarks that generate text cannot be run on a GGUF file; leave them out.")


def find_gguf(place: str) -> Path:
    """The file `PATH.gguf` or `HUB/ID/FILE.gguf[@REVISION]`, which is downloaded if it is not cached.

    Raises:
        ValueError: if there is no such file.
    """
    if os.path.isfile(place):
        return Path(place)
    from huggingface_hub import hf_hub_download

    name, _, revision = place.partition("@")
    parts = name.split("/")
    if len(parts) < 3 or place.startswith((".", "~", "/")):
        raise ValueError(f"There is no file {place!r}.")
    repo = "/".join(parts[:2])
    with hub_errors(place, repo, revision or None):
        return Path(hf_hub_download(repo, "/".join(parts[2:]), revision=revision or None))


class GGUFHeader:
    """What a GGUF file says about itself, read without its weights.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        ValueError: if it is not a GGUF file, or a truncated one.
    """

    def __init__(self, path: str | Path):
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(f"{str(path)!r} is not a GGUF file, or a damaged one: {error}") from error

    def tokens(self) -> list[str]:
        """The vocabulary, in the order of the ids; empty if the file has none."""
        field = self._reader.get_field("tokenizer.ggml.tokens")
        return [] if field is None else [bytes(field.parts[i]).decode(errors="replace") for i in field.data]

    def matrices(self) -> dict[str, Matrix]:
        """The weight matrices without embeddings, by name."""
        return {one.name: Matrix(int(one.n_elements), True) for one in self._tensors()}

    def held(self) -> dict[str, Held | str]:
        """What each of them holds; see [`Held`]."""
        found = {}
        for one in self._tensors():
            kind = one.tensor_type.name
            found[one.name] = f"is {kind}" if kind in _FULL_PRECISION else Held(kind, int(one.n_bytes))
        return found

    def embeddings(self) -> torch.Tensor | None:
        """The input embeddings, decoded; None if the file has none under the usual name."""
        from gguf import dequantize

        found = [one for one in self._reader.tensors if one.name == _EMBEDDINGS[0]]
        return torch.from_numpy(dequantize(found[0].data, found[0].tensor_type).copy()) if found else None

    def _tensors(self):
        return [one for one in self._reader.tensors if len(one.shape) > 1 and one.name not in _EMBEDDINGS]
