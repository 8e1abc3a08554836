"""Loss along lines and on planes."""

import math

import pytest
import torch
from toy_evaluation import FailsAfter, Quadratic, busy, held_out, moved, sharp_olmo2, unchanged, zeros

from hf_sam.instruments import held_out_loss, loss_along_line, loss_on_plane, loss_on_random_plane
from hf_sam.instruments.displacement import GaussianNoise
from hf_sam.instruments.random_plane import filter_normalized


def quadratic_pair():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.T / 5
    slope = torch.randn(5, generator=generator, dtype=torch.float64) / 10
    base, other = Quadratic(matrix, slope), Quadratic(matrix, slope)
    with torch.no_grad():
        other.weight.copy_(torch.tensor([0.5, -0.2, 0.1, 0.3, 0.4]))
    return base, other, matrix, slope


def test_a_quadratic_is_its_own_prediction():
    base, other, matrix, slope = quadratic_pair()
    line = loss_along_line(base, other, zeros(), positions=(-0.5, 0.0, 0.5, 1.0))
    d = other.weight.detach()
    assert line.losses == pytest.approx(line.quadratic, rel=1e-9)
    assert line.slope == pytest.approx((slope @ d).item())
    assert line.curvature == pytest.approx((d @ matrix @ d).item())
    assert line.distance == pytest.approx(d.norm().item())
    assert line.losses[2] == pytest.approx(1 + 0.5 * (slope @ d).item() + 0.125 * (d @ matrix @ d).item())


def test_ends_of_the_line_are_the_models_bit_for_bit():
    base = sharp_olmo2()
    other, data = moved(base), held_out()
    line = loss_along_line(base, other, data)
    assert line.losses[0] == held_out_loss(base, data).loss
    assert line.losses[-1] == held_out_loss(other, data).loss
    by_name = dict(other.state_dict())
    assert loss_along_line(base, by_name, data, positions=(0, 1), quadratic=False).losses[1] == line.losses[-1]


def test_prediction_is_of_second_order():
    """Halving the way divides what the prediction misses by eight at least; without curvature it would be by four."""
    base = sharp_olmo2(initializer_range=0.1)
    other, data = moved(base, 0.02), held_out()
    line = loss_along_line(base, other, data, positions=(0.0, 0.1, 0.2))
    near, far = (abs(a - b) for a, b in list(zip(line.losses, line.quadratic, strict=True))[1:])
    assert far / near > 6
    # and it does better than the straight line along the slope
    assert far < 0.5 * abs(line.losses[2] - line.losses[0] - 0.2 * line.slope)


def test_barrier_is_the_rise_above_the_straight_way():
    base, _, _, _ = quadratic_pair()
    hill = Quadratic(-torch.eye(5, dtype=torch.float64))
    other = Quadratic(-torch.eye(5, dtype=torch.float64))
    with torch.no_grad():
        hill.weight.fill_(-0.3)
        other.weight.fill_(0.3)
    line = loss_along_line(hill, other, zeros(), quadratic=False)
    assert line.barrier == pytest.approx(0.5 * 5 * 0.09)
    assert loss_along_line(base, base, zeros(), quadratic=False).barrier == pytest.approx(0.0)


def test_plane_has_the_models_where_they_lie():
    """The quadratic is known everywhere on the plane."""
    base, first, matrix, slope = quadratic_pair()
    second = Quadratic(matrix, slope)
    with torch.no_grad():
        second.weight.copy_(torch.tensor([0.1, 0.2, -0.3, 0.1, 0.0]))
    plane = loss_on_plane(base, first, second, zeros(), steps=4, margin=0.5)
    u = first.weight.detach()
    v = second.weight.detach()
    x_axis = u / u.norm()
    rest = v - (v @ x_axis) * x_axis
    y_axis = rest / rest.norm()
    assert plane.points["first"] == pytest.approx((u.norm().item(), 0.0))
    assert plane.points["second"] == pytest.approx(((v @ x_axis).item(), rest.norm().item()))
    for row, y in zip(plane.losses, plane.y, strict=True):
        for loss, x in zip(row, plane.x, strict=True):
            w = x * x_axis + y * y_axis
            assert loss == pytest.approx((1 + slope @ w + w @ matrix @ w / 2).item(), rel=1e-9)
    assert min(plane.x) < 0 < plane.points["first"][0] < max(plane.x)


def test_models_on_one_line_span_no_plane():
    base, first, matrix, slope = quadratic_pair()
    second = Quadratic(matrix, slope)
    with torch.no_grad():
        second.weight.copy_(2 * first.weight)
    for pair in ((first, second), (first, first), (base, first)):
        with pytest.raises(ValueError, match="one line"):
            loss_on_plane(base, *pair, zeros())


def test_random_directions_have_the_norms_of_the_filters():
    model = sharp_olmo2()
    params = dict(model.named_parameters())
    noise = GaussianNoise(params, 1.0, 3)
    for name, param in params.items():
        direction = filter_normalized(noise, name, param.detach())
        if param.dim() == 1:
            assert not direction.any()
        else:
            torch.testing.assert_close(direction.norm(dim=1), param.detach().norm(dim=1))


def test_random_plane_is_around_the_model():
    model, data = sharp_olmo2(), held_out()
    plane = loss_on_random_plane(model, data, radius=0.5, steps=3)
    center = held_out_loss(model, data).loss
    assert plane.losses[1][1] == center
    assert len({loss for row in plane.losses for loss in row}) == 9
    assert loss_on_random_plane(model, data, radius=0.5, steps=3).losses == plane.losses
    assert loss_on_random_plane(model, data, radius=0.5, steps=3, seed=1).losses != plane.losses


def test_the_models_are_left_as_they_were():
    base, other = busy(sharp_olmo2()), busy(moved(sharp_olmo2()))
    data, third = held_out(4), moved(base, 0.1, seed=5)
    with unchanged(base, other):
        loss_along_line(base, other, data, positions=(0, 1))
        loss_on_plane(base, other, third, data, steps=2)
        loss_on_random_plane(base, data, steps=2)
    for calls in (0, 1, 2, 3):
        failing = FailsAfter(base, calls)
        with unchanged(failing, other), pytest.raises(KeyboardInterrupt):
            loss_along_line(failing, FailsAfter(other, 99), data, positions=(0, 0.5, 1))


def test_models_of_other_shapes_are_refused():
    base, resized = sharp_olmo2(), sharp_olmo2(vocab_size=80)
    with unchanged(base), pytest.raises(ValueError, match=r"shape \(64, 64\).*\(80, 64\)"):
        loss_along_line(base, resized, held_out())
    with pytest.raises(ValueError, match=r"no 'model.layers.1"):
        loss_along_line(base, sharp_olmo2(num_hidden_layers=1), held_out())


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_planes_put_the_model_back_when_they_are_interrupted(calls):
    base = busy(sharp_olmo2())
    first, second, data = moved(base), moved(base, seed=2), held_out(4)
    failing = FailsAfter(base, calls)
    ends = [{f"model.{name}": value for name, value in model.state_dict().items()} for model in (first, second)]
    with unchanged(failing), pytest.raises(KeyboardInterrupt):
        loss_on_plane(failing, *ends, data, steps=2)
    failing.calls = calls
    with unchanged(failing), pytest.raises(KeyboardInterrupt):
        loss_on_random_plane(failing, data, steps=2)


@pytest.mark.parametrize("positions", [(0.0,), (1.0, 0.0), (0.0, 0.0, 1.0)])
def test_positions_must_ascend(positions):
    with pytest.raises(ValueError, match="ascending"):
        loss_along_line(sharp_olmo2(), moved(sharp_olmo2()), held_out(), positions=positions)
    with pytest.raises(ValueError, match="radius"):
        loss_on_random_plane(sharp_olmo2(), held_out(), radius=math.inf)
