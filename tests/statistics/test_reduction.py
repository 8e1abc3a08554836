"""How much less one method loses than another: on curves that are known."""

import math

import numpy as np
import pytest
from toy_sweeps import World, sweeps

from hf_sam.statistics import (
    HeldOutLoss,
    TunedRun,
    damage_reduction,
    forgetting_reduction,
    mean_forgetting,
)

RATES = np.geomspace(2e-4, 8e-4, 5)


def run(name, task, lost, documents=300, noise=0.0, seed=0, base=3.0):
    """A run whose losses are exact on average, with noise between documents that is the same in all runs."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 150, documents)
    wobble = generator.normal(0, noise, documents)
    wobble -= (wobble * tokens).sum() / tokens.sum()
    before = HeldOutLoss(base * tokens.astype(float), tokens)
    after = HeldOutLoss((base + lost * (1 + wobble)) * tokens, tokens)
    return TunedRun(name, before, after, HeldOutLoss(task * (1 + wobble / 10) * tokens, tokens))


def sweep(curve, losses=(1.0, 1.5, 2.0, 2.5), **kwargs):
    return [run(str(loss), loss, curve(loss), **kwargs) for loss in losses]


def test_reduction_on_known_curves():
    """One method forgets (3 - loss)^2, the other 0.7 times that, from a base that is worse by 0.1."""
    reference = sweep(lambda loss: (3 - loss) ** 2)
    method = sweep(lambda loss: 0.7 * (3 - loss) ** 2, losses=(1.2, 1.8, 2.6), base=3.1)
    found = forgetting_reduction(reference, method)
    assert (found.low, found.high) == pytest.approx((1.2, 2.5))
    mean = (1.8**3 - 0.5**3) / 3 / 1.3  # of (3 - loss)^2 between these
    assert found.reference == pytest.approx(mean, rel=1e-3)
    assert found.relative.value == pytest.approx(0.3)
    assert (found.end_reference, found.end_method) == pytest.approx((3 + mean, 3.1 + 0.7 * mean), rel=1e-3)
    assert found.end_difference.value == pytest.approx(found.end_method - found.end_reference)
    assert found.end_difference.low < 0.1 - 0.3 * mean < found.end_difference.high < 0
    # All documents are the same; what remains is the error of the interpolation.
    assert 0.29 < found.relative.low < 0.3 < found.relative.high < 0.31
    assert [one.value for one in found.curve.relative] == pytest.approx([0.3] * 21)
    assert found.curve.task_loss[[0, -1]] == pytest.approx([1.2, 2.5])


def test_the_number_is_the_mean_of_the_curve_weighted_by_what_the_reference_forgets():
    reference, method = sweep(lambda loss: (3 - loss) ** 2), sweep(lambda loss: (3 - loss) ** 3 / 3)
    found = forgetting_reduction(reference, method)
    relative = np.asarray([one.value for one in found.curve.relative])
    assert (np.diff(relative) > 0).all()  # forgets less where little is learned, and more where much is
    assert found.relative.value == pytest.approx(np.average(relative, weights=found.curve.reference), abs=0.01)


def test_reduction_pairs_the_documents():
    """What is hard about a document is so for both methods, and cancels."""
    reference = sweep(lambda loss: (3 - loss) ** 2, noise=0.5)
    method = sweep(lambda loss: 0.7 * (3 - loss) ** 2, noise=0.5)
    relative = forgetting_reduction(reference, method).relative
    assert relative.value == pytest.approx(0.3, abs=1e-6)
    assert relative.high - relative.low < 0.02


def test_reduction_refuses_what_has_no_answer():
    reference = sweep(lambda loss: 3 - loss)
    with pytest.raises(ValueError, match="share no task loss"):
        forgetting_reduction(reference, sweep(lambda loss: 3 - loss, losses=(2.6, 2.8)))
    with pytest.raises(ValueError, match="different tokens"):
        forgetting_reduction(reference, sweep(lambda loss: 3 - loss, documents=200))
    with pytest.raises(ValueError, match="holds no runs"):
        forgetting_reduction(reference, [])
    with pytest.raises(ValueError, match="2 seeds of the reference and 1 of the method"):
        forgetting_reduction([reference, reference], [reference])


def test_a_reference_that_forgets_nothing_gives_no_interval():
    found = forgetting_reduction(sweep(lambda loss: 0.001 * (2 - loss), noise=50.0), sweep(lambda loss: 3 - loss))
    assert math.isnan(found.relative.low)
    assert "may be zero" in found.relative.problem


def test_a_reference_that_improved_is_no_measure():
    """Fine-tuning that helps old data, and helps it more with the method: not "100% more forgetting"."""
    found = forgetting_reduction(sweep(lambda loss: -0.1 * (3 - loss)), sweep(lambda loss: -0.2 * (3 - loss)))
    assert math.isnan(found.relative.value)
    assert found.relative.problem == "the reference forgot nothing"
    assert found.end_difference.value < 0


def test_two_runs_do_not_show_how_a_curve_bends():
    two = sweep(lambda loss: 3 - loss, losses=(1.0, 2.5))
    found = forgetting_reduction(two, sweep(lambda loss: 3 - loss))
    assert math.isnan(found.relative.low)
    assert "fewer than three runs" in found.relative.problem


def test_what_makes_the_figures_less_certain_is_said():
    four, other = sweep(lambda loss: 3 - loss), sweep(lambda loss: 3 - loss, losses=(1.0, 1.5, 2.0, 2.4))
    text = " ".join(forgetting_reduction(four, other).warnings)
    assert "4 runs on its frontier" in text
    assert "The sweeps have other runs" in text
    assert "One training seed" in text
    short = sweep(lambda loss: 3 - loss, losses=(1.0, 1.1, 1.2, 1.3, 1.4))
    assert "less than half" in " ".join(forgetting_reduction(four, short).warnings)
    five = sweep(lambda loss: 3 - loss, losses=(1.0, 1.3, 1.6, 1.9, 2.2))
    assert forgetting_reduction([five] * 2, [five] * 2).warnings == []


@pytest.mark.parametrize("grids", [(3, 9), (9, 3), (4, 7), (5, 5), (3, 3)])
def test_a_method_against_itself_is_not_different(grids):
    """On any rates of its own, without noise between the two: only the interpolation can make a difference.

    500 sweeps, together; straight lines show up to 20% here.
    """
    generator = np.random.default_rng(sum(grids))
    for _ in range(100):
        power, scale = generator.uniform(1, 4), generator.uniform(0.05, 0.2)
        ends = np.sort(generator.uniform(1.2e-4, 9e-4, (2, 2)))
        if not ends[0, 0] * 1.3 < ends[1, 1] or not ends[1, 0] * 1.3 < ends[0, 1]:
            ends = np.asarray([[2e-4, 8e-4], [1.5e-4, 6e-4]])
        rates = [np.geomspace(*pair, count) for pair, count in zip(ends, grids, strict=True)]

        def curve(loss, power=power, scale=scale):
            return scale * (4.55 - loss) ** power

        both = [sweep(curve, 4.13 - 0.72 * np.log2(one / 1.5e-4), documents=20) for one in rates]
        relative = forgetting_reduction(*both).relative
        assert relative.low <= 0 <= relative.high
        assert abs(relative.value) < (0.15 if min(grids) < 4 else 0.02)


def test_seeds_widen_the_interval_and_are_paired():
    """What a seed does to both methods cancels; what it does to one of them counts."""
    generator = np.random.default_rng(0)

    def seeds(scale, noise):
        return [sweep(lambda loss, s=s: scale * s * (3 - loss) ** 2) for s in noise]

    common, own = 1 + 0.1 * generator.standard_normal((2, 4))
    paired = forgetting_reduction(seeds(1, common), seeds(0.7, common))
    assert paired.relative.value == pytest.approx(0.3)
    assert paired.relative.high - paired.relative.low < 0.02
    found = forgetting_reduction(seeds(1, np.ones(4)), seeds(0.7, own))
    expected = 0.7 * own.std(ddof=1) / 2 * 3.182  # Student's t with 3 degrees
    assert (found.relative.high - found.relative.low) / 2 == pytest.approx(expected, rel=0.02)
    assert found.seeds == 4


def losses(value, documents=100, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 150, documents)
    return HeldOutLoss((value + generator.normal(0, 0.02, documents)) * tokens, tokens)


def test_reduction_of_damage():
    """Few bits cost one method 0.05 and the other 0.03."""
    before, after, small = losses(3.0), losses(3.05), losses(3.03)
    found = damage_reduction([(before, after)], [(before, small)])
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((0.4, 0.4))  # the same noise in all of them
    noisy = HeldOutLoss(after.document_losses + losses(0.0, seed=1).document_losses, after.document_tokens)
    found = damage_reduction([(before, noisy)], [(before, small)])
    assert found.low < 0.4 < found.high
    with pytest.raises(ValueError, match="different tokens"):
        damage_reduction([(before, after)], [(losses(3.0, 50), losses(3.1, 50))])


def test_damage_over_seeds():
    grown = [[(losses(3.0), losses(3.0 + 0.01 * d)) for d in damages] for damages in ((5.0, 6.0, 4.0), (3.0, 3.5, 2.5))]
    found = damage_reduction(*grown)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.4 < found.high
    mean = mean_forgetting(grown[0])
    assert mean.value == pytest.approx(0.05)
    assert (mean.high - mean.low) / 2 == pytest.approx(0.01 / math.sqrt(3) * 4.303, rel=1e-3)


def test_runs_are_of_one_set_of_documents():
    one, other = run("a", 1.0, 0.5), run("b", 1.0, 0.5, documents=10)
    with pytest.raises(ValueError, match="different tokens"):
        TunedRun("c", one.before, other.after, one.task)


def test_noise_of_documents_is_in_the_interval():
    """Each method on its own documents' noise: the interval is as wide as results differ between draws."""
    generator = np.random.default_rng(0)
    world = World(documents=100, spread=0.5)
    found = []
    for _ in range(60):
        drawn = sweeps(world, {"reference": (RATES, 0.125), "method": (RATES, 0.1)}, 1, generator)
        found.append(forgetting_reduction(drawn["reference"][0], drawn["method"][0]).relative)
    width = np.mean([one.high - one.low for one in found])
    spread = np.std([one.value for one in found])
    assert width == pytest.approx(2 * 1.98 * spread, rel=0.35)
    assert np.mean([one.value for one in found]) == pytest.approx(0.2, abs=0.01)
