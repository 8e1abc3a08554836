"""Quantization: that it happens, what it costs, and that its absence is noticed."""

import re
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from toy_evaluation import FailsAfter, busy, held_out, sharp_olmo2, unchanged
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_sam.instruments import held_out_loss
from hf_sam.quantizers import QUANTIZERS, load_quantized, quantization_damage, quantized, round_to_nearest
from hf_sam.quantizers.proof import matrices, prove, quantizable
from hf_sam.runtime.disk import check_disk

# 14 linear layers of 64 x 64, 128 x 64 and 64 x 128. Scales: 32 bits for 64 weights (8 for double), or for a row in
# int8; of rounding 16 bits and a zero point for 128 weights of a row; of torchao and HQQ in fp32, as the model.
BITS = {
    "nf4": 4.5,
    "fp4": 4.5,
    "nf4-double": 4.13,
    "fp4-double": 4.13,
    "int8": 8.45,
    "rtn8": 8.34,
    "rtn6": 6.31,
    "rtn5": 5.3,
    "rtn4": 4.28,
    "rtn3": 3.27,
    "rtn2": 2.25,
    "torchao-int4": 5.0,
    "torchao-int8": 8.56,
    "torchao-fp8": 8.45,
    "hqq8": 9.0,
    "hqq4": 5.0,
    "hqq3": 4.35,
    "hqq2": 3.0,
}
UNCALIBRATED = [scheme for scheme, quantizer in QUANTIZERS.items() if not quantizer.calibrated]


@pytest.fixture(scope="module")
def model():
    return sharp_olmo2()


@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_damage_is_measured_on_a_model_that_really_is_quantized(model, scheme):
    for package in QUANTIZERS[scheme].packages:
        pytest.importorskip(package)
    with unchanged(model):
        measured = quantization_damage(model, held_out(30), scheme)
    assert measured.quantized.layers == 14
    assert measured.quantized.weights == sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert measured.quantized.bits == pytest.approx(BITS[scheme], abs=0.01)
    assert measured.damage.value == pytest.approx(measured.after.loss - measured.before.loss)
    assert measured.after.loss != measured.before.loss
    assert measured.before.loss == held_out_loss(model, held_out(30)).loss


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "nf4-double"])
def test_damage_is_that_of_the_rounded_weights(model, scheme):
    """The same loss as the plain model with bitsandbytes' values in it: nothing else of the model has changed."""
    with quantized(model, scheme) as (small, _):
        measured = held_out_loss(small, held_out()).loss
        values = {
            f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
            for name, module in small.named_modules()
            if isinstance(module, Linear4bit)
        }
    plain = sharp_olmo2()
    plain.load_state_dict({**model.state_dict(), **values})
    # On some CPUs bitsandbytes would compute in bf16, which costs 4e-3 here.
    assert measured == pytest.approx(held_out_loss(plain, held_out()).loss, rel=1e-5)


def test_rounding_to_nearest_by_hand():
    torch.manual_seed(0)
    weight = torch.randn(6, 300)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 300), torch.nn.Linear(300, 6, bias=False), torch.nn.Linear(6, 4))
    with torch.no_grad():
        model[1].weight.copy_(weight)
    embedding, head = model[0].weight.clone(), model[2].weight.clone()
    made = round_to_nearest(model, 3, group_size=128)
    assert torch.equal(model[0].weight, embedding)
    assert torch.equal(model[2].weight, head)
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        for row in range(6):
            group, rounded = weight[row, start:stop], model[1].weight[row, start:stop]
            step = (group.max() - group.min()) / 7
            assert len(rounded.unique()) <= 8
            # The zero point is rounded, too: the ends of the range may be off by half a step more.
            assert (rounded - group).abs().max() <= step * 1.01
            inside = (group > group.min() + step) & (group < group.max() - step)
            assert (rounded - group)[inside].abs().max() <= step * 0.501
    # 3 bits each, and 16 + 3 for each of 3 groups a row.
    assert made.bytes_after == (6 * 300 * 3 + 18 * 19 + 7) // 8
    assert made.layers == 1


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_a_layer_that_was_not_rounded_is_no_proof(bits):
    """With 8 bits a group of 128 holds no more values than 256, rounded or not; they must lie on a grid."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    held = QUANTIZERS[f"rtn{bits}"].held
    assert re.match("holds", held(layer, "weight"))
    model = torch.nn.Sequential(layer, torch.nn.Linear(64, 4))
    round_to_nearest(model, bits)
    assert held(layer, "weight").kind == "rounded"
    with torch.no_grad():
        layer.weight[17, 200] += 1e-3
    assert re.match("holds", held(layer, "weight"))


def test_values_on_the_grid_stay():
    model = torch.nn.Sequential(torch.nn.Linear(8, 1, bias=False), torch.nn.Linear(1, 1))
    grid = torch.arange(8.0)[None] * 0.25 - 0.75
    with torch.no_grad():
        model[0].weight.copy_(grid)
    round_to_nearest(model, 3)
    torch.testing.assert_close(model[0].weight.detach(), grid)


def test_models_that_bitsandbytes_does_not_cover_are_rounded():
    """GPT-2's own kind of linear layer, along its input dimension; and stacked experts."""
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    )
    layer = gpt2.transformer.h[0].mlp.c_fc
    before = layer.weight.detach().clone()  # (inputs, outputs)
    made = round_to_nearest(gpt2, 4, group_size=64)
    assert made.layers == 4
    assert all(len(column.unique()) <= 16 for column in layer.weight.detach().T)
    assert not torch.equal(layer.weight, before)

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.randn(3, 5, 40))
            self.head = torch.nn.Linear(5, 2)

    assert [name for name, _ in quantizable(Experts())] == ["experts"]


def test_tied_embeddings_stay_in_full_precision():
    model = sharp_olmo2(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    with quantized(model, "rtn3"):
        assert torch.equal(model.lm_head.weight, before)
    with quantized(model, "nf4") as (small, _):
        assert torch.equal(small.lm_head.weight, before)


def test_a_model_that_stayed_as_it_was_is_an_error(model, tmp_path, monkeypatch):
    """As with a misspelled option, which transformers ignores."""
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)

    def check_quantized(model, scheme):
        prove(model, scheme, matrices(plain), QUANTIZERS[scheme].held)

    with pytest.raises(RuntimeError, match=r"to nf4 failed silently: 'model.layers.0.self_attn.q_proj' is a Linear"):
        check_quantized(plain, "nf4")
    small, _ = load_quantized(tmp_path, "fp4")
    with pytest.raises(RuntimeError, match="is quantized to fp4"):
        check_quantized(small, "nf4")
    with pytest.raises(RuntimeError, match="is quantized to fp4"):
        check_quantized(small, "fp4-double")
    with pytest.raises(RuntimeError, match="is a Linear4bit"):
        check_quantized(small, "int8")
    small.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 128)
    with pytest.raises(RuntimeError, match=r"'model.layers.1.mlp.up_proj' is a Linear"):
        check_quantized(small, "fp4")
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, quantization_config=None, **kwargs: real(path, **kwargs)
    )
    with pytest.raises(RuntimeError, match="failed silently"):
        load_quantized(tmp_path, "nf4")


def test_quantizing_twice_is_refused(model):
    with quantized(model, "nf4") as (small, _), pytest.raises(ValueError, match="quantized already"):
        round_to_nearest(small, 4)


@pytest.mark.parametrize("scheme", ["rtn3", "nf4"])
def test_the_model_is_left_as_it_was(scheme):
    model = busy(sharp_olmo2())
    with unchanged(model), pytest.raises(KeyboardInterrupt), quantized(model, scheme) as (small, _):
        held_out_loss(FailsAfter(small, calls=1), held_out(), batch_size=4)


def test_a_full_disk_is_told_before(model, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with unchanged(model), pytest.raises(OSError, match=r"No disk space: .*TMPDIR"), quantized(model, "nf4"):
        pass
    with quantized(model, "rtn4"):  # needs none
        pass
    with pytest.raises(OSError, match="needs 5 MiB"):
        check_disk("not/there/yet", 5 << 20, "it")


def test_unknown_schemes_are_refused(model):
    with pytest.raises(ValueError, match=r"no quantization scheme 'nf5'; choose one of nf4"):
        quantization_damage(model, held_out(), "nf5")
    with pytest.raises(ValueError, match="bits=9"):
        round_to_nearest(model, 9)
