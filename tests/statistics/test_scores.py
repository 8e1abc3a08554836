"""Scores at equal task loss: on curves that are known, and with intervals that cover."""

import numpy as np
import pytest

from hf_sam.statistics import HeldOutLoss, ScoredRun, score_difference

LOSSES = (1.0, 1.4, 2.0, 2.5)


def run(loss, accuracies, generator=None, examples=(4000, 2000)) -> ScoredRun:
    """A run with these true accuracies; exact ones without a generator."""
    tokens = np.full(50, 100)
    scores = []
    for accuracy, count in zip(accuracies, examples, strict=True):
        ranks = np.linspace(0, 1, count, endpoint=False) if generator is None else generator.random(count)
        scores.append((ranks < accuracy).astype(float))
    wobble = np.zeros(50) if generator is None else generator.normal(0, 0.05, 50)
    return ScoredRun(HeldOutLoss((loss + wobble) * tokens, tokens), scores)


def sweep(lift, losses=LOSSES, **kwargs):
    """Accuracy falls the more is learned: 0.5 and 0.7 at a task loss of 2.5, 0.2 less at 1."""
    fallen = [0.2 * (2.5 - loss) / 1.5 for loss in losses]
    return [run(loss, (0.5 - f + lift, 0.7 - f + lift), **kwargs) for loss, f in zip(losses, fallen, strict=True)]


def test_known_curves():
    """One method learns less at each rate, and so loses less accuracy: at equal task loss it is better by 0.03."""
    found = score_difference([sweep(0.0)], [sweep(0.03, losses=(1.5, 1.9, 2.3))])
    assert (found.low, found.high) == pytest.approx((1.5, 2.3))
    assert found.difference.value == pytest.approx(0.03, abs=1e-3)
    assert found.reference == pytest.approx(0.6 - 0.2 * (2.5 - 1.9) / 1.5, abs=1e-3)
    assert found.method == pytest.approx(found.reference + 0.03, abs=1e-3)
    with pytest.raises(ValueError, match="share no task loss"):
        score_difference([sweep(0.0)], [sweep(0.0, losses=(0.1, 0.5, 0.9))])


def test_two_runs_give_no_interval():
    found = score_difference([sweep(0.0, losses=(1.0, 2.5))], [sweep(0.03)]).difference
    assert np.isnan(found.low)
    assert "fewer than three runs" in found.problem


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_cover(seeds):
    generator = np.random.default_rng(seeds)
    found = []
    for _ in range(60 // seeds):
        reference, method = (
            [sweep(lift, generator=generator, examples=(300, 100)) for _ in range(seeds)] for lift in (0.0, 0.02)
        )
        estimate = score_difference(reference, method).difference
        found.append(estimate.low <= 0.02 <= estimate.high)
    assert np.mean(found) >= 0.85  # 60 and 20 draws: 95% less three and two standard errors of the count


def test_a_method_against_itself():
    generator = np.random.default_rng(0)
    one = [sweep(0.0, generator=generator)]
    found = score_difference(one, one).difference
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
