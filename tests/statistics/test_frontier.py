"""The learning-forgetting frontier: against curves that are known."""

import numpy as np
import pytest

from hf_sam.statistics import (
    HeldOutLoss,
    TunedRun,
    forgetting_at,
    forgetting_reduction,
    inflection_point,
    pareto_frontier,
    shared_range,
)


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


def test_frontier_leaves_out_what_is_beaten():
    points = [(2.0, 0.1), (1.0, 0.5), (1.5, 0.2), (1.6, 0.4), (1.0, 0.6), (2.5, 0.1)]
    assert pareto_frontier(points) == [1, 2, 0]
    assert pareto_frontier([]) == []


def test_interpolation_on_a_known_curve():
    points = [(loss, 3 - loss) for loss in (1.0, 1.7, 2.0)]
    assert forgetting_at(1.3, points) == pytest.approx(1.7)
    assert forgetting_at(1.7, points) == pytest.approx(1.3)
    # A run that is worse in both does not bend the curve.
    assert forgetting_at(1.3, [*points, (1.5, 2.9)]) == pytest.approx(1.7)


@pytest.mark.parametrize("at", [0.99, 2.01, float("nan")])
def test_nothing_is_extrapolated(at):
    with pytest.raises(ValueError, match=r"does not span .* from 1.0000 to 2.0000"):
        forgetting_at(at, [(1.0, 0.5), (2.0, 0.1)])


def test_shared_range():
    assert shared_range([(1.0, 0.5), (2.0, 0.1)], [(1.5, 0.4), (3.0, 0.1)]) == (1.5, 2.0)
    with pytest.raises(ValueError, match="share no task loss"):
        shared_range([(1.0, 0.5), (2.0, 0.1)], [(2.5, 0.4), (3.0, 0.1)])


def test_reduction_on_known_curves():
    """One method forgets 3 - loss, the other 0.7 times that, from a base that is worse by 0.1."""
    reference = sweep(lambda loss: 3 - loss)
    method = sweep(lambda loss: 0.7 * (3 - loss), losses=(1.2, 1.8, 2.6), base=3.1)
    found = forgetting_reduction(reference, method, task_loss=1.4)
    assert found.reference == pytest.approx(1.6)
    assert found.method == pytest.approx(0.7 * 1.6)
    assert found.relative.value == pytest.approx(0.3)
    # All documents are the same, so that the interval is a point.
    assert (found.relative.low, found.relative.high) == pytest.approx((0.3, 0.3))
    assert found.end_reference == pytest.approx(3.0 + 1.6)
    assert found.end_method == pytest.approx(3.1 + 0.7 * 1.6)
    assert forgetting_reduction(reference, method).task_loss == pytest.approx((1.2 + 2.5) / 2)


def test_interval_of_the_reduction_holds_the_truth():
    """Other documents each time: a 90% interval misses in about one of ten."""
    hits = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        tokens = np.full(80, 100)

        def noisy(level, at, generator=generator, tokens=tokens):
            before = HeldOutLoss(3.0 * tokens, tokens)
            after = HeldOutLoss((3.0 + level * (3 - at) + generator.normal(0, 0.3, 80)) * tokens, tokens)
            return TunedRun(str(at), before, after, HeldOutLoss(at * tokens.astype(float), tokens))

        found = forgetting_reduction(
            [noisy(1.0, 1.0), noisy(1.0, 2.0)],
            [noisy(0.7, 1.0), noisy(0.7, 2.0)],
            task_loss=1.5,
            confidence=0.9,
            resamples=300,
            seed=seed,
        )
        hits += found.relative.low <= 0.3 <= found.relative.high
        assert found.used == 1.0
    assert 46 <= hits <= 59


def test_reduction_pairs_the_documents():
    """What is hard about a document is so for both methods, and cancels."""
    reference = sweep(lambda loss: 3 - loss, noise=0.5)
    method = sweep(lambda loss: 0.7 * (3 - loss), noise=0.5)
    relative = forgetting_reduction(reference, method).relative
    assert relative.value == pytest.approx(0.3, abs=1e-6)
    assert relative.high - relative.low < 0.02


def test_reduction_refuses_what_has_no_answer():
    reference = sweep(lambda loss: 3 - loss)
    with pytest.raises(ValueError, match="does not span"):
        forgetting_reduction(reference, reference, task_loss=0.5)
    with pytest.raises(ValueError, match="forgets nothing"):
        forgetting_reduction(sweep(lambda loss: -loss), reference, task_loss=2.5)
    with pytest.raises(ValueError, match="different tokens"):
        forgetting_reduction(reference, sweep(lambda loss: 3 - loss, documents=200))


def test_runs_are_of_one_set_of_documents():
    one, other = run("a", 1.0, 0.5), run("b", 1.0, 0.5, documents=10)
    with pytest.raises(ValueError, match="different tokens"):
        TunedRun("c", one.before, other.after, one.task)


def test_inflection_point_is_where_the_best_tuned_model_turns():
    # Two learning rates at each budget; the larger one is better early.
    points = [(1, 2.0), (1, 2.2), (2, 1.8), (2, 1.9), (3, 1.7), (3, 1.9), (4, 1.75), (4, 1.72)]
    found = inflection_point(points)
    assert (found.budget, found.loss) == (3.0, 1.7)
    assert found.degradation == pytest.approx(0.02)
    assert inflection_point(points, noise=0.05) is None


def test_no_inflection_where_more_pretraining_always_helps():
    assert inflection_point([(1, 2.0), (2, 1.9), (3, 1.8)]) is None
    with pytest.raises(ValueError, match="three budgets"):
        inflection_point([(1, 2.0), (2, 1.9), (2, 1.8)])
