"""The pretraining budget beyond which tuned models get worse."""

import pytest

from hf_sam.statistics import inflection_point


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
