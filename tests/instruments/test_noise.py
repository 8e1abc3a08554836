"""KL divergence and sensitivity under noise."""

import math

import numpy as np
import pytest
import torch
from memory import peak_bytes
from toy_evaluation import FailsAfter, busy, held_out, sharp_olmo2, unchanged

from hf_sam.instruments import HeldOutData, held_out_loss, noise_kl, noise_sensitivity
from hf_sam.instruments.displacement import GaussianNoise, sample_seed
from hf_sam.instruments.kl import kl_divergence


@pytest.fixture(scope="module")
def model():
    return sharp_olmo2()


def noisy_copy(model, sigma, seed):
    """The model with the noise that `noise_kl` adds, in place of which it restores."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    params = dict(other.named_parameters())
    noise = GaussianNoise(params, sigma, seed)
    for name, param in params.items():
        noise.add(name, param.detach().clone(), param.detach())
    return other.eval()


def test_kl_is_the_direct_sum_in_fp64(model):
    data = held_out(6)
    measured = noise_kl(model, data, sigma=1e-3, samples=2)
    for sample, value in enumerate(measured.samples):
        other = noisy_copy(model, 1e-3, sample_seed(0, sample))
        total = count = 0
        for row in data.rows:
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                p = model.eval()(ids).logits[0, :-1].double().softmax(-1)
                q = other(ids).logits[0, :-1].double().softmax(-1)
            total += (p * (p.log() - q.log())).sum().item()
            count += len(p)
        assert value == pytest.approx(total / count, rel=1e-4)
        assert measured.tokens == count
    assert measured.value == pytest.approx(np.mean(measured.samples))
    assert measured.standard_error == pytest.approx(np.std(measured.samples, ddof=1) / math.sqrt(2))


def test_kl_of_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert kl_divergence(p.log(), q.log() + 3.0).item() == pytest.approx(expected, rel=1e-7)


def test_kl_is_quadratic_in_sigma_down_to_the_smallest(model):
    """KL = sigma^2 / 2 tr F for small sigma; summed in fp32 it would be rounding errors at 1e-5."""
    small, large = (noise_kl(model, held_out(4), sigma=sigma, samples=3) for sigma in (1e-5, 1e-4))
    # Third-order terms, and fp32 logits.
    assert large.value / small.value == pytest.approx(100, rel=0.02)
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 3
    other = logits + 1e-5 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    exact = kl_divergence(logits, other)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    in_fp32 = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert ((in_fp32 - exact).abs() > 0.5 * exact.abs()).float().mean() > 0.5


@pytest.mark.parametrize("batch_size", [1, 5])
def test_kl_does_not_depend_on_the_batch_size(model, batch_size):
    # Logits of other batch shapes differ in the last bits of fp32: this noise moves them by 1e4 times as much.
    settings = {"sigma": 1e-3, "samples": 2}
    one, other = noise_kl(model, held_out(), **settings), noise_kl(model, held_out(), batch_size=batch_size, **settings)
    assert other.samples == pytest.approx(one.samples, rel=1e-3)


def test_noise_has_its_deviation_and_is_reproducible():
    weight = torch.nn.Parameter(torch.zeros(300, 5000))  # more than one chunk
    params = {"w": weight}
    out = [torch.empty(300, 5000) for _ in range(3)]
    for tensor, seed in zip(out, (1, 1, 2), strict=True):
        GaussianNoise(params, 0.5, seed).add("w", weight.detach(), tensor)
    assert torch.equal(out[0], out[1])
    assert abs(torch.corrcoef(torch.stack([out[0].flatten(), out[2].flatten()]))[0, 1]) < 5e-3
    assert out[0].std() == pytest.approx(0.5, rel=5e-3)
    assert abs(torch.corrcoef(torch.stack([out[0][:150].flatten(), out[0][150:].flatten()]))[0, 1]) < 5e-3


def test_noise_that_drowns_in_bf16_is_refused():
    model = sharp_olmo2().to(torch.bfloat16)
    with unchanged(model), pytest.raises(ValueError, match=r"does not survive in torch.bfloat16.*float32"):
        noise_kl(model, held_out())


def test_noise_that_bf16_can_hold_is_taken():
    model = sharp_olmo2()
    reference = noise_kl(model, held_out(), sigma=0.05, samples=2)
    coarse = noise_kl(sharp_olmo2().to(torch.bfloat16), held_out(), sigma=0.05, samples=2)
    assert coarse.value == pytest.approx(reference.value, rel=0.1)


def test_quantized_weights_are_refused():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="is quantized"):
        noise_kl(model, held_out())


def test_autocast_does_not_swallow_the_noise(model):
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = noise_kl(model, held_out(4), samples=2)
    assert under_autocast.samples == noise_kl(model, held_out(4), samples=2).samples


def test_tf32_does_not_swallow_the_noise(model):
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append([b.fp32_precision for b in backends]))
    try:
        backends[0].fp32_precision = "tf32"
        noise_kl(model, held_out(2), samples=1)
        assert seen == [["ieee", "ieee"]] * len(seen)
        assert backends[0].fp32_precision == "tf32"
    finally:
        hook.remove()
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_a_model_prepared_for_bf16_training_is_measured_in_full_precision(model):
    from accelerate import Accelerator

    expected = noise_kl(model, held_out(4), samples=2)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(sharp_olmo2())
    forward = prepared.forward
    assert noise_kl(prepared, held_out(4), samples=2).samples == expected.samples
    assert prepared.forward == forward


def test_parameters_choose_what_gets_noise(model):
    everything = noise_kl(model, held_out(4), samples=2).value
    head = noise_kl(model, held_out(4), samples=2, parameters="lm_head").value
    assert 0 < head < everything
    with pytest.raises(ValueError, match="'nothing' matches none"):
        noise_kl(model, held_out(4), parameters="nothing")


def test_sensitivity_by_hand(model):
    measured = noise_sensitivity(model, held_out(4), strengths=(0.1, 0.5), relative_to="weights", samples=2)
    scales = {name: param.detach().square().mean().sqrt().item() for name, param in model.named_parameters()}
    assert measured.loss == held_out_loss(model, held_out(4)).loss
    for strength, losses in zip((0.1, 0.5), measured.losses, strict=True):
        for sample, loss in enumerate(losses):
            deviations = {name: strength * scale for name, scale in scales.items()}
            other = noisy_copy(model, deviations, sample_seed(0, sample))
            assert held_out_loss(other, held_out(4)).loss == pytest.approx(loss, rel=1e-6)
    assert measured.degradations == pytest.approx([np.mean(row) - measured.loss for row in measured.losses])


def test_scale_at_initialization_is_that_of_the_config(model):
    from hf_sam.instruments.layer_scales import layer_scales
    from hf_sam.instruments.measuring import measuring

    with torch.no_grad():
        grown = sharp_olmo2()
        for param in grown.parameters():
            param.mul_(3)
    with measuring(grown):
        scales = layer_scales(grown, dict(grown.named_parameters()), "initialization")
    assert scales["model.norm.weight"] == 0
    # initializer_range is 0.2, whatever training made of the weights; thousands of weights give it to some per cent.
    matrices = [scale for name, scale in scales.items() if "norm" not in name]
    assert matrices == pytest.approx([0.2] * len(matrices), rel=0.05)


def test_adapters_have_no_scale_at_initialization():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(sharp_olmo2(), LoraConfig(target_modules=["q_proj"]))
    with unchanged(model), pytest.raises(ValueError, match="relative_to='weights'"):
        noise_sensitivity(model, held_out(4))


@pytest.mark.parametrize("measure", [noise_kl, noise_sensitivity])
def test_the_model_is_left_as_it_was(measure):
    model = busy(sharp_olmo2())
    settings = {"samples": 2} if measure is noise_kl else {"samples": 1, "relative_to": "weights"}
    with unchanged(model):
        measure(model, held_out(4), **settings)
    for calls in (0, 1, 3):
        failing = FailsAfter(model, calls)
        with unchanged(failing), pytest.raises(KeyboardInterrupt):
            measure(failing, held_out(), batch_size=4, **settings)


@pytest.mark.parametrize("relative_to", [None, "weights", "initialization"])
def test_memory_is_one_copy_of_the_weights(relative_to):
    """A model of 16 MB with tiny activations; noise is drawn in chunks of 4 MB, twice while one is added."""
    model = sharp_olmo2(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8)
    size = sum(param.nbytes for param in model.parameters())
    data = HeldOutData([{"input_ids": [3, 4, 5]}])
    if relative_to is None:
        peak = peak_bytes(lambda: noise_kl(model, data, samples=2))
    else:
        settings = {"samples": 1, "relative_to": relative_to, "strengths": (0.1,)}
        peak = peak_bytes(lambda: noise_sensitivity(model, data, **settings))
    # The fresh model for the scales at initialization is gone before the copy is made.
    assert size < peak < 1.1 * size + 12e6


@pytest.mark.parametrize("settings", [{"sigma": 0.0}, {"sigma": -1.0}, {"sigma": math.nan}, {"samples": 0}])
def test_senseless_settings_are_refused(model, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        noise_kl(model, held_out(4), **settings)
