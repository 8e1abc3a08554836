"""GPTQ and AWQ by llm-compressor, where the extra `llmcompressor` is installed, which needs an older transformers."""

import dataclasses

import pytest
import torch
from toy_evaluation import held_out, sharp_olmo2, token_rows, unchanged

from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.quantizers import QUANTIZERS, quantization_damage, quantized

pytest.importorskip("llmcompressor")

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def calibration():
    return HeldOutData(token_rows(64, low=12, seed=7))


def test_gptq_is_measured_as_deployed():
    model = sharp_olmo2(**WIDE)
    with unchanged(model):
        found = quantization_damage(model, held_out(30), "gptq4", calibration=calibration())
    assert found.quantized.layers == 14
    assert found.quantized.bits == pytest.approx(4.25)
    with quantized(model, "gptq4", calibration=calibration()) as (small, _):
        held_out_loss(small, held_out(30))  # unpacks the weights
        plain = sharp_olmo2(**WIDE)
        plain.load_state_dict({name: small.state_dict()[name] for name in plain.state_dict()})
    # Whatever llm-compressor made of the weights, nothing else of the model has changed.
    assert held_out_loss(plain, held_out(30)).loss == pytest.approx(found.after.loss, abs=1e-5)
    # GPTQ fits the outputs of layers on its data better than rounding does.
    errors, inputs = {}, calibration().batches(64)[0].inputs
    for scheme in ("gptq4", "rtn4"):
        options = {"calibration": calibration()} if scheme == "gptq4" else {}
        with quantized(model, scheme, **options) as (small, _):
            outputs = small(**inputs, output_hidden_states=True).hidden_states[-1]
        exact = model(**inputs, output_hidden_states=True).hidden_states[-1]
        errors[scheme] = (outputs - exact).norm().item()
    assert errors["gptq4"] < errors["rtn4"]


def test_awq_needs_an_accelerator():
    with (
        pytest.raises(ValueError, match=r"awq4 cannot run here: .* there is none"),
        quantized(sharp_olmo2(**WIDE), "awq4", calibration=calibration()),
    ):
        pass


def test_awq_runs_but_for_the_pinned_memory(monkeypatch):
    """All of it on a CPU, except that llm-compressor pins memory for an accelerator."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)
    monkeypatch.setitem(QUANTIZERS, "awq4", dataclasses.replace(QUANTIZERS["awq4"], problem=lambda device: None))
    model = sharp_olmo2(**WIDE)
    found = quantization_damage(model, held_out(30), "awq4", calibration=calibration())
    assert found.quantized.layers == 14
    assert found.quantized.bits == pytest.approx(4.28, abs=0.01)
