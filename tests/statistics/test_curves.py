"""Curves of forgetting against task loss, against curves that are known."""

import numpy as np
import pytest

from hf_sam.statistics import forgetting_at, pareto_frontier, shared_range
from hf_sam.statistics.curves import SCALES, curve


def test_frontier_leaves_out_what_is_beaten():
    points = [(2.0, 0.1), (1.0, 0.5), (1.5, 0.2), (1.6, 0.4), (1.0, 0.6), (2.5, 0.1)]
    assert pareto_frontier(points) == [1, 2, 0]
    assert pareto_frontier([]) == []


def test_a_square_is_interpolated_exactly():
    points = [(loss, (3 - loss) ** 2) for loss in (1.0, 1.7, 2.0)]
    assert forgetting_at(1.3, points) == pytest.approx(1.7**2)
    assert forgetting_at(1.7, points) == pytest.approx(1.3**2)
    # A run that is worse in both does not bend the curve.
    assert forgetting_at(1.3, [*points, (1.5, 4.1)]) == pytest.approx(1.7**2)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.1, 3.0, 4.0])
@pytest.mark.parametrize("runs", [3, 5, 9])
def test_powers_are_interpolated_within_a_third_of_a_per_cent_of_their_mean(power, runs):
    """Where straight lines err by up to 12%."""
    losses, at = np.linspace(2.95, 3.83, runs), np.linspace(2.95, 3.83, 200)
    points = [(loss, (4.55 - loss) ** power) for loss in losses]
    truth = (4.55 - at) ** power
    assert curve(points, at).mean() == pytest.approx(truth.mean(), rel=0.003)
    assert curve(points, at) == pytest.approx(truth, rel=0.012)


def test_the_scales_are_apart_by_more_than_the_error():
    """So that their distance is an upper bound of it."""
    at = np.linspace(2.95, 3.83, 200)
    for power in (1.5, 2.1, 3.0, 4.0):
        points = [(loss, (4.55 - loss) ** power) for loss in np.linspace(2.95, 3.83, 3)]
        means = [curve(points, at, scale).mean() for scale in SCALES]
        assert max(abs(means[0] - mean) for mean in means[1:]) > abs(means[0] - ((4.55 - at) ** power).mean())


def test_a_curve_passes_through_gains():
    """A run may lose less than nothing."""
    points = [(1.0, 0.4), (2.0, 0.1), (3.0, -0.1)]
    found = curve(points, np.linspace(1, 3, 50))
    assert found[[0, -1]] == pytest.approx([0.4, -0.1])
    assert (np.diff(found) < 0).all()


def test_runs_with_one_task_loss_are_one_point():
    assert curve([(1.0, 0.2), (1.0, 0.2)], np.asarray([1.0])) == pytest.approx([0.2])


@pytest.mark.parametrize("at", [0.99, 2.01, float("nan")])
def test_nothing_is_extrapolated(at):
    with pytest.raises(ValueError, match=r"does not span .* from 1.0000 to 2.0000"):
        forgetting_at(at, [(1.0, 0.5), (2.0, 0.1)])


def test_shared_range():
    assert shared_range([(1.0, 0.5), (2.0, 0.1)], [(1.5, 0.4), (3.0, 0.1)]) == (1.5, 2.0)
    with pytest.raises(ValueError, match="share no task loss"):
        shared_range([(1.0, 0.5), (2.0, 0.1)], [(2.5, 0.4), (3.0, 0.1)])
