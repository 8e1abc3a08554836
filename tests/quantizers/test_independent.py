"""The damage of each scheme is what other code computes for it: the plain model with weights rounded by hand."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy_evaluation import held_out, sharp_olmo2

from hf_sam.instruments import held_out_loss
from hf_sam.quantizers import QUANTIZERS, quantization_damage, quantized

WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def model():
    return sharp_olmo2(**WIDE)


def nf4_codes() -> np.ndarray:
    """QLoRA, appendix E: quantiles of a normal distribution, 8 on the positive side, 7 on the negative one, and 0."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([positive, negative, [0.0]]))
    return codes / codes.max()


def fp4_codes() -> np.ndarray:
    """Sign, two bits of exponent, one of mantissa, with one subnormal, as fractions of the largest (12)."""
    magnitudes = np.asarray([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return np.sort(np.concatenate([magnitudes, -magnitudes]))


def by_codebook(codes: np.ndarray):
    def rounded(weight: np.ndarray) -> np.ndarray:
        blocks = weight.reshape(-1, 64)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        middle = (codes[1:] + codes[:-1]) / 2
        return (codes[np.searchsorted(middle, blocks / largest)] * largest).reshape(weight.shape)

    return rounded


def by_steps(bits: int, group: int):
    """Evenly spaced from the smallest to the largest of a group, with 0 among the values."""

    def rounded(weight: np.ndarray) -> np.ndarray:
        blocks = weight.reshape(-1, group)
        low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
        step = (high - low) / (2**bits - 1)
        zero = np.round(-low / step)
        codes = np.clip(np.round(blocks / step) + zero, 0, 2**bits - 1)
        return ((codes - zero) * step).reshape(weight.shape)

    return rounded


def tinygemm(weight: np.ndarray) -> np.ndarray:
    """Evenly spaced from the smallest to the largest of 128 weights; 0 need not be among the values."""
    blocks = weight.reshape(-1, 128)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    step = (high - low) / 15
    return (low + np.clip(np.round((blocks - low) / step), 0, 15) * step).reshape(weight.shape)


def llm_int8(weight: np.ndarray) -> np.ndarray:
    """Rows of fp16 weights in 8 bits."""
    weight = weight.astype(np.float16).astype(np.float32)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    return np.round(weight * (np.float32(127) / largest)) * largest / 127


def int8_rows(weight: np.ndarray) -> np.ndarray:
    step = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127.5)
    return np.clip(np.round(weight * (1 / step)), -128, 127) * step


def fp8_rows(weight: np.ndarray) -> np.ndarray:
    scale = torch.tensor(np.abs(weight).max(axis=1, keepdims=True) / 448)
    return ((torch.tensor(weight) / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale).numpy()


ROUNDED = {
    "nf4": by_codebook(nf4_codes()),
    "fp4": by_codebook(fp4_codes()),
    **{f"rtn{bits}": by_steps(bits, 128) for bits in (8, 6, 5, 4, 3, 2)},
    "torchao-int4": tinygemm,
    "torchao-int8": int8_rows,
    "torchao-fp8": fp8_rows,
}


@torch.no_grad()
def with_rounded(model, rounded):
    """A plain model whose linear layers hold rounded weights."""
    other = sharp_olmo2(**WIDE)
    other.load_state_dict(model.state_dict())
    for name, param in other.named_parameters():
        if "proj" in name:
            param.copy_(torch.from_numpy(rounded(param.numpy()).astype(np.float32)))
    return other


@pytest.mark.parametrize("scheme", ROUNDED)
def test_damage_is_that_of_weights_rounded_by_hand(model, scheme):
    for package in QUANTIZERS[scheme].packages:
        pytest.importorskip(package)
    found = quantization_damage(model, held_out(30), scheme)
    by_hand = held_out_loss(with_rounded(model, ROUNDED[scheme]), held_out(30))
    assert found.after.loss == pytest.approx(by_hand.loss, abs=2e-4)
    # Far smaller than the damage itself, whose sign is chance in a model of random weights.
    size = np.abs(found.after.document_losses - found.before.document_losses).sum()
    assert np.abs(found.after.document_losses - by_hand.document_losses).sum() < 0.02 * size


def test_every_scheme_is_compared_with_other_code():
    """Those that are missing above have tests of their own, below and in test_calibrated.py."""
    own = {"nf4-double", "fp4-double", "int8", "hqq8", "hqq4", "hqq3", "hqq2", "gptq4", "awq4"}
    assert set(ROUNDED) | own == set(QUANTIZERS)


@pytest.mark.parametrize("scheme", ["nf4-double", "fp4-double"])
def test_double_quantization_is_near_the_single_one(model, scheme):
    """The scales have 8 bits, so the weights of both differ by less than 1% of the largest of a block."""
    single = by_codebook(nf4_codes() if scheme.startswith("nf4") else fp4_codes())
    with quantized(model, scheme) as (small, _):
        from bitsandbytes.functional import dequantize_4bit

        for name, param in model.named_parameters():
            if "proj" in name:
                weight = small.get_parameter(name)
                values = dequantize_4bit(weight.data, weight.quant_state).numpy()
                largest = np.abs(param.detach().numpy()).max()
                assert np.abs(values - single(param.detach().numpy())).max() < 0.02 * largest


def test_int8_rounds_weights_and_activations(model):
    """LLM.int8(): rows of weights and of activations in 8 bits each; columns with an activation above 6 stay whole."""

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        large = flat.half().abs() >= 6
        whole = large.any(0)
        rest = flat.half().masked_fill(large, 0)
        largest = rest.abs().amax(1, keepdim=True).float().clamp(min=1e-9)
        rounded = ((rest * (127 / largest)).round() * largest / 127).masked_fill(whole, 0)
        # bitsandbytes writes 1 / 127**2 with this many digits.
        result = rounded @ weight.T * (6.200124e-05 * 127**2) + flat[:, whole] @ weight[:, whole].T
        return result.reshape(*x.shape[:-1], -1)

    seen = {}

    def remember(name, module, arguments, output):
        seen[name] = arguments[0], output

    by_hand = with_rounded(model, llm_int8)
    with quantized(model, "int8") as (small, _), torch.no_grad():
        for name, module in small.named_modules():
            if name.endswith("proj"):
                module.register_forward_hook(functools.partial(remember, name))
        held_out_loss(small, held_out(30))
    assert len(seen) == 14
    # Layer by layer on the same inputs, because one activation that is rounded the other way changes all that follow.
    for name, (x, output) in seen.items():
        difference = output - forward(x, by_hand.get_submodule(name).weight.detach())
        assert difference.abs().mean() < 2e-4 * output.abs().mean(), name


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_is_its_own_grid_and_no_worse_than_rounding(model, bits):
    """Each group of 64 holds at most 2**bits evenly spaced values, which lie nearer than those of plain rounding."""
    with quantized(model, f"hqq{bits}") as (small, _):
        after = held_out_loss(small, held_out(30)).loss
        values = {name: m.dequantize().detach() for name, m in small.named_modules() if type(m).__name__ == "HQQLinear"}
    assert len(values) == 14
    plain = with_rounded(model, lambda weight: weight)
    errors = []
    for name, weight in values.items():
        original = model.get_submodule(name).weight.detach().numpy()
        first = weight.reshape(-1, 64)[0].unique()
        assert len(first) <= 2**bits
        steps = first.diff() / first.diff().min()
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.02 * 2**bits)
        errors.append([np.abs(v - original).mean() for v in (weight.numpy(), by_steps(bits, 64)(original))])
        plain.get_submodule(name).weight.data.copy_(weight)
    hqq, rounding = np.mean(errors, axis=0)
    assert hqq < 1.02 * rounding
    assert held_out_loss(plain, held_out(30)).loss == pytest.approx(after, abs=1e-4)
