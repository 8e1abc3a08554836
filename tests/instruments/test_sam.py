"""SAM sharpness: against the gradient and the loss by hand."""

import math

import pytest
import torch
from memory import peak_bytes
from toy_evaluation import FailsAfter, Quadratic, busy, held_out, sharp_olmo2, unchanged, zeros

from hf_sam.instruments import HeldOutData, held_out_loss, sam_sharpness
from hf_sam.step.reference import PERTURBATIONS


def by_hand(model, data, rho, variant):
    """L(w + e) of all documents together, with autograd on one loss and the plain perturbation."""
    params = dict(model.named_parameters())
    total = sum(
        torch.nn.functional.cross_entropy(
            model(torch.tensor([row.input_ids])).logits[0, :-1], torch.tensor(row.input_ids[1:]), reduction="sum"
        )
        for row in data.rows
    )
    gradients = torch.autograd.grad(total / data.tokens, params.values())
    with torch.no_grad():
        e, norm = PERTURBATIONS[variant](params, dict(zip(params, gradients, strict=True)), rho, {})
        for name, param in params.items():
            param.add_(e[name])
    return norm.item(), held_out_loss(model, data).loss


@pytest.mark.parametrize(("variant", "rho"), [("sam", 0.05), ("asam", 0.5)])
def test_sharpness_by_hand(variant, rho):
    data = held_out(8)
    measured = sam_sharpness(sharp_olmo2(), data, rho=rho, variant=variant)
    norm, perturbed = by_hand(sharp_olmo2().eval(), data, rho, variant)
    assert measured.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert measured.perturbed_loss == pytest.approx(perturbed, rel=1e-6)
    assert measured.value == pytest.approx(perturbed - held_out_loss(sharp_olmo2(), data).loss, rel=1e-3)
    assert measured.value > 0


def test_sharpness_of_a_quadratic():
    """With gradient g at 0, L(rho g / |g|) - L(0) = rho |g| + rho^2 / 2 g.Ag / |g|^2."""
    matrix = torch.diag(torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64))
    slope = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    measured = sam_sharpness(Quadratic(matrix, slope), zeros(), rho=0.1)
    assert measured.gradient_norm == pytest.approx(0.5)
    assert measured.value == pytest.approx(0.1 * 0.5 + 0.005 * (0.36 * 1 + 0.64 * 9), rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sharpness_does_not_depend_on_the_batch_size(batch_size):
    model = sharp_olmo2()
    one, other = sam_sharpness(model, held_out()), sam_sharpness(model, held_out(), batch_size=batch_size)
    # A difference of two losses near 6 nats, in fp32.
    assert other.value == pytest.approx(one.value, rel=1e-4)


def test_parameters_choose_what_is_perturbed():
    model = sharp_olmo2()
    whole, norms = sam_sharpness(model, held_out()), sam_sharpness(model, held_out(), parameters="norm")
    assert 0 < norms.value < whole.value


def test_the_model_is_left_as_it_was():
    model = busy(sharp_olmo2())
    with unchanged(model):
        sam_sharpness(model, held_out(4))
    # In the clean loss, in the gradient, in the perturbed loss.
    for calls in (0, 4, 7):
        failing = FailsAfter(model, calls)
        with unchanged(failing), pytest.raises(KeyboardInterrupt):
            sam_sharpness(failing, held_out(), batch_size=4)


@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_memory_is_one_copy_of_the_weights(variant):
    """The gradient is the copy; a single layer of scratch comes on top."""
    model = sharp_olmo2(
        hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4
    )
    size = sum(param.nbytes for param in model.parameters())
    largest = max(param.nbytes for param in model.parameters())
    data = HeldOutData([{"input_ids": [3, 4, 5]}])
    peak = peak_bytes(lambda: sam_sharpness(model, data, variant=variant))
    assert size < peak < size + 4 * largest


def test_coarse_weights_are_refused():
    with pytest.raises(ValueError, match=r"SAM sharpness needs fp32 weights.*torch.bfloat16"):
        sam_sharpness(sharp_olmo2().to(torch.bfloat16), held_out())


def test_optimizers_in_the_backward_pass_are_refused():
    model = sharp_olmo2()
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda param: param.data.zero_())
    with unchanged(model), pytest.raises(ValueError, match="steps in the backward pass"):
        sam_sharpness(model, held_out())


@pytest.mark.parametrize("rho", [0.0, -1.0, math.inf])
def test_senseless_radii_are_refused(rho):
    with pytest.raises(ValueError, match="rho="):
        sam_sharpness(sharp_olmo2(), held_out(), rho=rho)


def test_variants_that_the_data_does_not_determine_are_refused():
    with pytest.raises(ValueError, match="does not determine the variant 'momentum'"):
        sam_sharpness(sharp_olmo2(), held_out(), variant="momentum")
