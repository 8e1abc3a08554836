"""Data, models and checks that the tests of the instruments share."""

import contextlib
import random

import numpy as np
import torch
import transformers
from toy import VOCABULARY
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_sam.instruments import HeldOutData

transformers.utils.logging.disable_progress_bar()


def token_rows(count: int = 12, low: int = 3, high: int = 20, seed: int = 0) -> list[dict]:
    """Documents of random tokens of very different lengths."""
    generator = random.Random(seed)
    return [
        {"input_ids": [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(low, high))]}
        for _ in range(count)
    ]


def held_out(count: int = 12, **kwargs) -> HeldOutData:
    """Those documents, each a row."""
    return HeldOutData(token_rows(count, **kwargs))


def sharp_olmo2(seed: int = 0, **overrides) -> Olmo2ForCausalLM:
    """A model whose predictions are far from uniform, so that measures have something to see; 64 wide for 4 bits."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return Olmo2ForCausalLM(Olmo2Config(**{**settings, **overrides}))


def moved(model: torch.nn.Module, by: float = 0.05, seed: int = 1) -> torch.nn.Module:
    """The same model with noise in all weights: what fine-tuning might have made of it."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * by)
    return other


def document_losses(model, rows: list[dict]) -> np.ndarray:
    """Summed loss of each document, computed one document at a time in fp64 by the definition."""
    model = model.eval()
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_p[torch.arange(len(ids[0]) - 1), ids[0, 1:]].sum().item())
    return np.asarray(losses)


class Quadratic(torch.nn.Module):
    """A "language model" of two tokens whose loss on token 0 is exactly 1 + g.w + w.Aw / 2."""

    def __init__(self, matrix: torch.Tensor, slope: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))
        self.register_buffer("matrix", matrix)
        self.register_buffer("slope", torch.zeros(len(matrix), dtype=matrix.dtype) if slope is None else slope)

    def forward(self, input_ids, attention_mask=None):
        loss = 1 + self.slope @ self.weight + self.weight @ self.matrix @ self.weight / 2
        # The two probabilities add up to 1, so that softmax leaves them as they are.
        logits = torch.stack([-loss, torch.log1p(-torch.exp(-loss))])
        return CausalLMOutput(logits=logits.expand(*input_ids.shape, 2))


def zeros(documents: int = 3, length: int = 4) -> HeldOutData:
    """Documents of token 0, for [`Quadratic`]."""
    return HeldOutData([{"input_ids": [0] * length}] * documents)


def snapshot(model: torch.nn.Module) -> dict:
    """Everything of a model, and of the random streams, that a measurement must leave alone."""
    return {
        "state": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    }


def assert_same(before: dict, after: dict):
    """Two snapshots agree in every bit."""
    for kind in ("state", "grads"):
        assert before[kind].keys() == after[kind].keys()
        for name, value in before[kind].items():
            other = after[kind][name]
            assert (value is None) == (other is None), name
            assert value is None or torch.equal(value, other), name
    assert before["flags"] == after["flags"]
    assert before["storage"] == after["storage"]
    assert before["modes"] == after["modes"]
    assert torch.equal(before["random"][0], after["random"][0])
    assert np.array_equal(before["random"][1], after["random"][1])
    assert before["random"][2] == after["random"][2]


@contextlib.contextmanager
def unchanged(*models: torch.nn.Module):
    """Fails if one of the models is not as it was, also after an error."""
    before = [snapshot(model) for model in models]
    try:
        yield
    finally:
        for model, state in zip(models, before, strict=True):
            assert_same(state, snapshot(model))


class FailsAfter(torch.nn.Module):
    """A wrapper that raises in one of its forward passes, like an interrupt in the middle of a measurement."""

    def __init__(self, model: torch.nn.Module, calls: int, error: type[BaseException] = KeyboardInterrupt):
        super().__init__()
        self.model = model
        self.calls = calls
        self.error = error

    def forward(self, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise self.error("half-way")
        return self.model(**kwargs)


def busy(model: torch.nn.Module) -> torch.nn.Module:
    """A model in the middle of something: in training mode, one layer in evaluation, frozen weights, gradients."""
    model.train()
    next(iter(model.children())).eval()
    params = list(model.parameters())
    params[0].requires_grad_(False)
    params[1].grad = torch.full_like(params[1], 0.5)
    return model
