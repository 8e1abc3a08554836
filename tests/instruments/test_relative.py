"""Sharpness in units of the weights: what a rescaling of layers that leaves the function alone does not change."""

import copy

import numpy as np
import pytest
import torch
from toy_evaluation import held_out, sharp_olmo2

from hf_sam.instruments import (
    Hessian,
    held_out_loss,
    hessian_spectrum,
    noise_kl,
    noise_sensitivity,
    relative_hessian_trace,
    relative_noise_kl,
    weight_norm,
)
from hf_sam.instruments.layer_scales import layer_scales


@pytest.fixture(scope="module")
def model():
    return sharp_olmo2(initializer_range=0.1)


@pytest.fixture(scope="module")
def rescaled(model):
    """The same function: in OLMo-2, `up` and `v` are followed by matrices without anything that bends in between."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.up_proj.weight.mul_(3)
            layer.mlp.down_proj.weight.div_(3)
            layer.self_attn.v_proj.weight.div_(4)
            layer.self_attn.o_proj.weight.mul_(4)
    return other


def test_the_function_is_the_same(model, rescaled):
    assert held_out_loss(rescaled, held_out()).loss == pytest.approx(held_out_loss(model, held_out()).loss, rel=1e-6)
    assert weight_norm(rescaled)["matrices"] > 1.5 * weight_norm(model)["matrices"]


def test_relative_noise_does_not_see_the_rescaling_and_plain_noise_does(model, rescaled):
    settings = {"samples": 2}
    found = [relative_noise_kl(one, held_out(), **settings).value for one in (model, rescaled)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    plain = [noise_kl(one, held_out(), sigma=1e-4, **settings).value for one in (model, rescaled)]
    assert abs(plain[1] / plain[0] - 1) > 0.1


def test_the_relative_trace_does_not_see_the_rescaling_and_the_plain_one_does(model, rescaled):
    found = [relative_hessian_trace(one, held_out(), probes=4).value for one in (model, rescaled)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    plain = [hessian_spectrum(one, held_out(), eigenvalues=0, probes=4).trace for one in (model, rescaled)]
    assert abs(plain[1] / plain[0] - 1) > 0.1


def test_the_relative_trace_is_that_of_the_scaled_hessian(model):
    """Against all diagonal elements of a norm's Hessian."""
    data, pattern = held_out(8), r"layers\.0\.post_attention_layernorm"
    with Hessian(model, data, parameters=pattern) as hessian:
        diagonal = torch.stack([(hessian @ row)[i] for i, row in enumerate(torch.eye(hessian.size))])
        (scale,) = layer_scales(model, hessian.params, "weights").values()
    found = relative_hessian_trace(model, data, probes=200, parameters=pattern)
    exact = float(scale**2 * diagonal.double().sum())
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.5 * abs(exact) + 1e-6


def test_relative_noise_raises_the_loss_by_half_the_relative_trace(model):
    """To second order in the strength, in the mean over the noise and its opposite, for which the slope cancels."""
    strength, samples = 0.02, 60
    grown = noise_sensitivity(model, held_out(), strengths=(strength,), relative_to="weights", samples=samples)
    error = np.std(grown.losses[0]) / np.sqrt(samples)
    expected = strength**2 / 2 * relative_hessian_trace(model, held_out(), probes=60).value
    assert grown.degradations[0] == pytest.approx(expected, abs=4 * error + 0.1 * expected)


def test_scales(model):
    params = dict(model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    norm = params[name].norm().item()
    assert layer_scales(model, params, "weights")[name] == pytest.approx(norm / params[name].numel() ** 0.5)
    assert layer_scales(model, params, "inverse_norm")[name] == pytest.approx(1 / norm)
    with pytest.raises(ValueError, match="one of initialization, weights, inverse_norm"):
        layer_scales(model, params, "size")


def test_norms(model):
    found = weight_norm(model)
    everything = torch.cat([param.flatten() for param in model.parameters()])
    assert found["norm"] == pytest.approx(everything.norm().item())
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "embed" not in name]
    assert found["matrices"] == pytest.approx(torch.cat([one.flatten() for one in matrices]).norm().item())
