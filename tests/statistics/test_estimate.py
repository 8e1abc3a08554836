"""Intervals: against closed forms, and against those of scipy where lengths are equal."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_sam.statistics.estimate import Variation, interval, over_documents, over_seeds, ratio


def documents(count=30, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(5.0, 2.0, count), generator.normal(9.0, 3.0, count)


def test_equal_lengths_give_the_interval_of_the_t_test():
    one, other = documents()
    tokens = np.full(len(one), 10)
    found = interval((other - one).mean() / 10, [1.0], [over_documents((other - one)[:, None], tokens)], 0.9)
    expected = stats.ttest_rel(other, one).confidence_interval(0.9)
    assert (10 * found.low, 10 * found.high) == pytest.approx((expected.low, expected.high))


def test_unequal_lengths_give_hc2_with_the_degrees_of_satterthwaite():
    generator = np.random.default_rng(1)
    tokens = generator.integers(10, 200, 40)
    sums = tokens * generator.normal(0.1, 0.05, 40)
    found = over_documents(sums[:, None], tokens)
    mean, share = sums.sum() / tokens.sum(), tokens / tokens.sum()
    residuals = (sums - mean * tokens) / tokens.sum()
    assert found.covariance[0, 0] == pytest.approx((residuals**2 / (1 - share)).sum())
    assert found.degrees == pytest.approx((tokens**2.0).sum() ** 2 / (tokens**4.0).sum())


@pytest.mark.parametrize("count", [150, 1000])
def test_a_statistic_varies_as_its_derivative_says(count):
    """Documents by groups, where there are many: the same up to the noise of their choice."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(50, 100, count)
    sums = tokens[:, None] * generator.normal((1.0, 2.0), 0.3, (count, 2))
    means = over_documents(sums, tokens)
    found = over_documents(sums, tokens, lambda means: np.asarray([means[0] * means[1]]))
    a, b = sums.sum(0) / tokens.sum()
    expected = np.asarray([b, a]) @ means.covariance @ np.asarray([b, a])
    assert found.covariance[0, 0] == pytest.approx(expected, rel=1e-3 if count == 150 else 0.25)


def test_documents_without_a_token_do_not_count():
    one, other = documents()
    tokens = np.full(len(one), 10)
    found = over_documents(np.append(other - one, 0.0)[:, None], np.append(tokens, 0))
    expected = over_documents((other - one)[:, None], tokens)
    assert found.covariance == pytest.approx(expected.covariance)
    assert found.degrees == expected.degrees


@pytest.mark.parametrize("tokens", [[100], [100, 90], [10_000, 20, 20, 20, 20, 20]])
def test_too_few_documents_give_no_interval(tokens):
    sums = np.asarray(tokens) * 0.1 + np.arange(len(tokens))
    found = interval(0.1, [1.0], [over_documents(sums[:, None], np.asarray(tokens))], 0.95)
    assert math.isnan(found.low)
    assert f"{len(tokens)} documents" in found.problem
    assert str(found) == "0.1000 [no interval]"


def test_seeds_give_the_t_interval_of_their_mean():
    values = np.asarray([0.3, 0.5, 0.35, 0.42])
    found = interval(values.mean(), [1.0], [over_seeds(values[:, None])], 0.95)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="two seeds"):
        over_seeds(values[:1, None])


def test_sources_add_with_the_degrees_of_welch():
    """The difference of two groups, which is Welch's test."""
    one, other = documents()
    other = other[:12]
    variations = [
        Variation("one", np.asarray([[one.var(ddof=1) / len(one)]]), len(one) - 1),
        Variation("other", np.asarray([[other.var(ddof=1) / len(other)]]), len(other) - 1),
    ]
    found = interval(other.mean() - one.mean(), [1.0], variations, 0.95)
    expected = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_ends_of_a_ratio_are_where_the_test_of_it_turns():
    """Fieller: the ratio r is in the interval where numerator - r * denominator is not clearly different from zero."""
    one, other = documents()
    both = np.stack([one, other], axis=1)
    found = ratio(one.mean(), other.mean(), [over_documents(both, np.ones(len(one)))], 0.95)
    assert found.value == pytest.approx(one.mean() / other.mean())
    for end in (found.low, found.high):
        difference = one - end * other
        half = stats.t.ppf(0.975, len(one) - 1) * difference.std(ddof=1) / math.sqrt(len(one))
        assert abs(difference.mean()) == pytest.approx(half)


def test_a_ratio_to_what_may_be_zero_has_no_interval():
    one, other = documents()
    both = np.stack([one, other - other.mean() + 0.1], axis=1)
    found = ratio(one.mean(), 0.1, [over_documents(both, np.ones(len(one)))], 0.95)
    assert found.value == pytest.approx(10 * one.mean())
    assert math.isnan(found.high)
    assert "may be zero" in found.problem


def test_a_numerator_below_zero_has_an_interval():
    one, other = documents()
    both = np.stack([-one, other], axis=1)
    found = ratio(-one.mean(), other.mean(), [over_documents(both, np.ones(len(one)))], 0.95)
    assert found.low < found.value < found.high < 0


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_the_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval(0.0, [1.0], [Variation("known", np.eye(1), math.inf)], confidence)
