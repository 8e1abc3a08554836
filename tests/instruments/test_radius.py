"""Loss rise against radius: by hand on one batch, and on a quadratic loss."""

import math

import numpy as np
import pytest
import torch
from toy_evaluation import FailsAfter, Quadratic, busy, held_out, sharp_olmo2, unchanged, zeros

from hf_sam.instruments import HeldOutData, RadiusProfile, held_out_loss, radius_profile, sam_sharpness
from hf_sam.step.noise import uniform_noise


def quadratic():
    """Loss 1 + 0.5 r + 3.7 r^2 at distance r along its gradient at 0."""
    matrix = torch.diag(torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64))
    return Quadratic(matrix, torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64))


CURVATURE = 0.36 * 1 + 0.64 * 9


@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_each_batch_climbs_its_own_gradient(variant):
    """On the rows of one batch, the rise is the SAM sharpness of those rows."""
    model, data = sharp_olmo2(), held_out(12)
    profile = radius_profile(model, data, rhos=[0.1, 0.02], ascent_batch_size=4, batches=3, kind=variant)
    parts = data.sample(4, 3)
    rows = sorted(row.document for part in parts for row in part.rows)
    assert rows == list(range(12))  # no row twice
    assert profile.rhos == (0.02, 0.1)
    assert profile.tokens == data.tokens
    for part, rises, loss, norm in zip(parts, profile.rises, profile.losses, profile.slopes, strict=True):
        assert loss == pytest.approx(held_out_loss(model, part).loss, rel=1e-6)
        for rho, rise in zip(profile.rhos, rises, strict=True):
            expected = sam_sharpness(model, part, rho=rho, variant=variant)
            assert norm == pytest.approx(expected.gradient_norm, rel=1e-5)
            assert rise == pytest.approx(expected.value, rel=1e-3, abs=1e-5)
    assert profile.mean_rises == pytest.approx(np.mean(profile.rises, axis=0))
    assert profile.standard_errors == pytest.approx(np.std(profile.rises, axis=0, ddof=1) / 3**0.5)


def test_curvature_share_and_radius_of_a_quadratic():
    profile = radius_profile(quadratic(), zeros(4), ascent_batch_size=2, batches=2)
    rhos = np.asarray(profile.rhos)
    rises = 0.5 * rhos + CURVATURE / 2 * rhos**2
    assert profile.mean_rises == pytest.approx(rises, rel=1e-9)
    assert profile.curvature_shares == pytest.approx(1 - 0.5 * rhos / rises, rel=1e-9)
    # A power of 2 times 0.1, from just below a rise of 0.01 on.
    assert np.log2(rhos / 0.1) == pytest.approx(np.round(np.log2(rhos / 0.1)))
    assert 0.5 * rhos[0] <= 0.01 < 0.5 * rhos[1]
    between = profile.radius_at(0.5)
    # Interpolated on a grid of factor 2 in logarithms.
    assert 0.5 * between + CURVATURE / 2 * between**2 == pytest.approx(0.5, rel=0.02)
    assert profile.radius_at(profile.mean_rises[3]) == pytest.approx(rhos[3])
    assert profile.radius_at(1e-4) is None
    assert profile.radius_at(1e4) is None


def test_the_largest_radius_is_where_the_loss_is_high():
    profile = radius_profile(sharp_olmo2(), held_out(8), ascent_batch_size=4, batches=2)
    assert profile.rises[0][-1] >= 4.0 > profile.rises[0][-2]


def test_noise_is_relative_to_each_weight_and_has_no_first_order():
    """Against the noise of the step, drawn anew; twice the noise raises the loss four times."""
    model, data = sharp_olmo2(), held_out(8)
    profile = radius_profile(
        model, data, kind="noise", rhos=[0.002, 0.004, 0.05], ascent_batch_size=4, batches=2, seed=3
    )
    assert (profile.curvature_shares == 1).all()
    assert profile.slopes == (0.0, 0.0)
    for i, part in enumerate(data.sample(4, 2, seed=3)):
        noisy = sharp_olmo2()
        with torch.no_grad():
            for name, param in noisy.named_parameters():
                noise = uniform_noise(f"radius 3 {i} {name}", 0, param.numel(), param.device)
                param.mul_(1 + 0.05 * noise.view_as(param))
        assert profile.rises[i][2] == pytest.approx(held_out_loss(noisy, part).loss - profile.losses[i], rel=1e-3)


def test_momentum_is_taken_for_the_difference_of_two_gradients():
    """All documents are the same, so that all gradients are: their difference is 0. With others, it is not."""
    same = HeldOutData([{"input_ids": [3, 4, 5, 6, 7]}] * 6)
    model = sharp_olmo2()
    options = {"kind": "momentum", "ascent_batch_size": 2, "batches": 1}
    with unchanged(model), pytest.raises(FloatingPointError, match="norm 0"):
        radius_profile(model, same, **options)
    data = held_out(6)
    profile = radius_profile(model, data, rhos=[0.5], **options)
    part, second, first = data.sample(2, 3)
    params = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(sum(document_loss(model, row) for row in rows.rows) / rows.tokens, params.values())
        for rows in (first, second)
    ]
    difference = [one - other for one, other in zip(*gradients, strict=True)]
    norm = torch.sqrt(sum(value.square().sum() for value in difference))
    with torch.no_grad():
        for param, value in zip(params.values(), difference, strict=True):
            param.add_(0.5 * value / norm)
    assert profile.rises[0][0] == pytest.approx(held_out_loss(model, part).loss - profile.losses[0], rel=1e-3)


def document_loss(model, row):
    logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(row.input_ids[1:]), reduction="sum")


def test_a_loss_that_is_not_finite_is_an_infinite_rise():
    """The quadratic "language model" has no probability where its loss is negative."""
    matrix = torch.diag(torch.tensor([-5.0], dtype=torch.float64))
    model = Quadratic(matrix, torch.tensor([0.1], dtype=torch.float64))
    with unchanged(model):
        profile = radius_profile(model, zeros(4), rhos=[0.01, 100.0], ascent_batch_size=2, batches=2)
    assert profile.mean_rises[1] == math.inf
    assert profile.radius_at(1.0) is None


def test_radius_at_takes_the_smallest_and_passes_over_falls():
    profile = RadiusProfile((0.1, 0.2, 0.4, 0.8), ((-0.1, 0.1, 0.4, 0.2),), (1.0,), (1.0,), 4, 100)
    assert profile.radius_at(0.2) == pytest.approx(0.2 * 2**0.5)
    assert profile.radius_at(0.05) is None
    assert np.isnan(profile.standard_errors).all()
    assert not profile.is_uncertain_at(0.2)


def test_radii_at_which_batches_differ_are_uncertain():
    profile = RadiusProfile((0.1, 0.2), ((0.1, 0.1), (0.11, 0.7)), (1.0, 1.0), (1.0, 1.0), 4, 100)
    assert not profile.is_uncertain_at(0.11)
    assert profile.is_uncertain_at(0.18)


def test_the_model_is_left_as_it_was():
    model = busy(sharp_olmo2())
    with unchanged(model):
        radius_profile(model, held_out(8), rhos=[0.1], ascent_batch_size=4, batches=2)
    # In a clean loss, in a gradient, in a perturbed loss, in the second batch.
    for calls in (0, 1, 2, 5):
        failing = FailsAfter(model, calls)
        with unchanged(failing), pytest.raises(KeyboardInterrupt):
            radius_profile(failing, held_out(8), rhos=[0.1], ascent_batch_size=4, batches=2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_does_not_depend_on_the_batch_size(batch_size):
    options = {"rhos": [0.2], "ascent_batch_size": 4, "batches": 2}
    one = radius_profile(sharp_olmo2(), held_out(8), **options)
    other = radius_profile(sharp_olmo2(), held_out(8), batch_size=batch_size, **options)
    assert other.rises == pytest.approx(np.asarray(one.rises), rel=1e-4)


def test_seeds_choose_other_rows():
    options = {"rhos": [0.2], "ascent_batch_size": 2, "batches": 2}
    first, second = (radius_profile(sharp_olmo2(), held_out(12), seed=seed, **options) for seed in (0, 1))
    assert first.losses != second.losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rhos": [0.1, 0.0]}, r"rhos=\[0.1, 0.0\] must be positive"),
        ({"rhos": []}, r"rhos=\[\] must be positive"),
        ({"kind": "sma"}, "kind='sma' must be 'momentum', 'noise', or a variant"),
        ({"kind": "momentum"}, "has 8 rows, but 6 batches of 4 rows need 24"),
        ({"ascent_batch_size": 5}, "has 8 rows, but 2 batches of 5 rows need 10"),
        ({"batches": 0}, "0 batches of 4 rows cannot be taken"),
        ({"parameters": "absent"}, "A radius has no weights"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        radius_profile(sharp_olmo2(), held_out(8), **{"ascent_batch_size": 4, "batches": 2, **options})


def test_coarse_weights_are_refused():
    with pytest.raises(ValueError, match="A radius needs fp32 weights"):
        radius_profile(sharp_olmo2().to(torch.bfloat16), held_out(8), ascent_batch_size=4, batches=2)


def test_a_zero_gradient_is_refused():
    model = Quadratic(torch.zeros(2, 2, dtype=torch.float64))
    with unchanged(model), pytest.raises(FloatingPointError, match=r"norm 0\.0; no radius"):
        radius_profile(model, zeros(4), ascent_batch_size=2, batches=2)


def test_samples_are_disjoint_and_the_same_each_time():
    data = HeldOutData([{"input_ids": list(range(3, 13))}] * 3, max_length=4)
    parts = data.sample(2, 3, seed=5)
    assert [part.rows for part in parts] == [part.rows for part in data.sample(2, 3, seed=5)]
    assert [len(part.rows) for part in parts] == [2, 2, 2]
