"""Hessian products, eigenvalues and trace: against the full matrix."""

import math

import numpy as np
import pytest
import torch
from toy_evaluation import FailsAfter, Quadratic, busy, held_out, sharp_olmo2, unchanged, zeros

from hf_sam.instruments import Hessian, hessian_spectrum
from hf_sam.instruments import hessian as module
from hf_sam.runtime.errors import MeasurementError


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / 2


def tiny(**overrides):
    """Some hundred weights, in fp64."""
    return sharp_olmo2(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.5,
        **overrides,
    ).double()


def full_hessian(model, data, names=None):
    """The matrix by torch.func, from one loss over all documents."""
    params = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}

    def loss(flat):
        pieces, start = {}, 0
        for name, param in params.items():
            pieces[name] = flat[start : start + param.numel()].view_as(param)
            start += param.numel()
        total = 0
        for row in data.rows:
            ids = torch.tensor([row.input_ids])
            logits = torch.func.functional_call(model, pieces, (ids,), {"use_cache": False}).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        return total / data.tokens

    flat = torch.cat([param.flatten() for param in params.values()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture(scope="module")
def network():
    model, data = tiny().eval(), held_out(4)
    return model, data, full_hessian(model, data)


@pytest.mark.parametrize("size", [6, 40], ids=["fewer dimensions than Lanczos vectors", "Lanczos"])
def test_spectrum_of_a_quadratic(size):
    matrix = symmetric(size)
    measured = hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=3, probes=200)
    values = np.linalg.eigvalsh(matrix.numpy())[::-1]
    assert measured.eigenvalues == pytest.approx(values[:3], rel=1e-3)
    assert all(residual < 1e-2 for residual in measured.residuals)
    for value, residual in zip(measured.eigenvalues, measured.residuals, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-9
    assert abs(measured.trace - matrix.trace()) < 4 * measured.trace_standard_error
    assert measured.parameters == size


def test_trace_of_a_diagonal_needs_one_probe():
    matrix = torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64))
    measured = hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=0, probes=1)
    assert measured.trace == pytest.approx(465.0)
    assert math.isnan(measured.trace_standard_error)
    assert measured.products == 1


def test_eigenvectors_take_their_part_out_of_the_noise_of_the_trace():
    """One direction dominates: known exactly, it adds nothing to the error."""
    spike = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = symmetric(40) + 50 * torch.outer(spike, spike)
    alone = hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=0, probes=20)
    helped = hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=1, probes=20)
    assert helped.trace_standard_error < 0.1 * alone.trace_standard_error
    assert abs(helped.trace - matrix.trace()) < 4 * helped.trace_standard_error


def test_products_of_a_network_are_those_of_the_full_matrix(network):
    model, data, full = network
    vector = torch.randn(len(full), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for batch_size in (1, 4):
        with Hessian(model, data, batch_size=batch_size) as hessian:
            # Norms and rotations of OLMo-2 are in fp32 even in an fp64 model.
            torch.testing.assert_close(hessian @ vector, full @ vector, rtol=1e-4, atol=1e-4)
            assert (full @ vector).abs().max() > 1


def test_spectrum_of_a_network(network):
    model, data, full = network
    measured = hessian_spectrum(model, data, eigenvalues=2, probes=100)
    values = np.linalg.eigvalsh(full.numpy())[::-1]
    assert measured.eigenvalues == pytest.approx(values[:2], rel=1e-3)
    for value, residual in zip(measured.eigenvalues, measured.residuals, strict=True):
        # Norms and rotations in fp32 make two matrices of the products and of `full`, some 1e-7 of their norm apart,
        # and the eigenvalues of two matrices are as far apart as these at most (Weyl).
        assert np.abs(values - value).min() <= residual + 1e-6 * values[0]
    assert abs(measured.trace - full.trace()) < 4 * measured.trace_standard_error


def test_gradient_is_that_of_the_loss(network):
    model, data, _ = network
    from hf_sam.instruments.gradients import loss_gradient

    with Hessian(model, data) as hessian:
        gradient = hessian.gradient()
    expected = loss_gradient(model, dict(model.named_parameters()), data, 8)
    torch.testing.assert_close(gradient, torch.cat([value.flatten() for value in expected.values()]))


def test_gradient_checkpointing_computes_the_same_in_less(network):
    model, data, _ = network
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with Hessian(model, data) as hessian:
        plain = hessian @ vector
    checkpointed = tiny()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = checkpointed.model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    with unchanged(checkpointed), Hessian(checkpointed, data) as hessian:
        torch.testing.assert_close(hessian @ vector, plain)
    assert len(calls) > 1  # computed again in the backward pass


def test_reentrant_checkpointing_is_refused():
    model = tiny()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with unchanged(model), pytest.raises(ValueError, match="use_reentrant"):
        hessian_spectrum(model, held_out(2))


def test_lora_has_the_hessian_of_its_own_weights():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny(), config).double().eval()
    data = held_out(3)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    full = full_hessian(model, data, names)
    with unchanged(model):
        measured = hessian_spectrum(model, data, eigenvalues=1, probes=0)
    assert measured.parameters == len(full) == 16
    assert measured.eigenvalues[0] == pytest.approx(np.linalg.eigvalsh(full.numpy())[-1], rel=1e-6)
    assert math.isnan(measured.trace)


def test_parameters_choose_a_block(network):
    model, data, _ = network
    names = [name for name, _ in model.named_parameters() if "mlp" in name]
    measured = hessian_spectrum(model, data, eigenvalues=1, probes=0, parameters="mlp")
    expected = np.linalg.eigvalsh(full_hessian(model, data, names).numpy())[-1]
    assert measured.eigenvalues[0] == pytest.approx(expected, rel=1e-3)


def test_dropout_stays_off():
    model = tiny(attention_dropout=0.5).train()
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with Hessian(model, held_out(2)) as first, Hessian(model, held_out(2)) as second:
        torch.testing.assert_close(first @ vector, second @ vector, rtol=0, atol=0)


def test_the_model_is_left_as_it_was():
    model = busy(sharp_olmo2())
    with unchanged(model):
        hessian_spectrum(model, held_out(2), eigenvalues=1, probes=1, parameters="norm")
    failing = FailsAfter(model, calls=2)
    with unchanged(failing), pytest.raises(KeyboardInterrupt):
        hessian_spectrum(failing, held_out(2), parameters="norm")


def test_a_linear_loss_has_no_curvature():
    measured = hessian_spectrum(
        Quadratic(torch.zeros(5, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)), zeros(), eigenvalues=0
    )
    assert measured.trace == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("negative", [False, True], ids=["largest is positive", "largest in size is negative"])
def test_without_memory_for_lanczos_power_iteration_finds_the_same(monkeypatch, negative):
    memory = module.psutil.virtual_memory()
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory._replace(available=1000))
    values = torch.tensor([-9.0 if negative else 3.0, 8.0, 6.0, *torch.linspace(-3, 3, 37)], dtype=torch.float64)
    basis = torch.linalg.qr(symmetric(40)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    measured = hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=2, probes=20)
    assert measured.eigenvalues == pytest.approx((8, 6), rel=1e-4)
    assert all(residual <= 3e-3 * 9 for residual in measured.residuals)
    assert abs(measured.trace - matrix.trace()) < 4 * measured.trace_standard_error
    monkeypatch.setattr(module, "_ITERATIONS", 2)
    with pytest.raises(MeasurementError, match="Power iteration came to"):
        hessian_spectrum(Quadratic(matrix), zeros(), eigenvalues=1, probes=0)


def test_coarse_weights_and_senseless_counts_are_refused():
    with pytest.raises(ValueError, match=r"The Hessian needs fp32 weights"):
        hessian_spectrum(sharp_olmo2().to(torch.bfloat16), held_out(2))
    with pytest.raises(ValueError, match="eigenvalues=0 and probes=0"):
        hessian_spectrum(Quadratic(symmetric(4)), zeros(), eigenvalues=0, probes=0)
