"""Evaluations of one method are those whose names differ in the seed only."""

from types import SimpleNamespace

import pytest

from hf_sam.report.methods import group_by_seed, pair


def named(*names):
    return [SimpleNamespace(name=name) for name in names]


@pytest.mark.parametrize(
    ("name", "method", "seed"),
    [
        ("sam-seed-3", "sam", 3),
        ("sam/seed3", "sam", 3),
        ("sam_seed=03", "sam", 3),
        ("sam rho 0.4 seed 11", "sam rho 0.4", 11),
        ("seed-3-sam", "sam", 3),
        ("sam-seed-3-long", "sam-long", 3),
        ("sam", "sam", None),
        ("seedling", "seedling", None),
        ("seed-3", "seed-3", 3),
    ],
)
def test_names(name, method, seed):
    (found,) = group_by_seed(named(name))
    assert found.name == method
    assert list(found.by_seed) == [seed]


def test_order_and_pairs():
    adamw, sam = group_by_seed(named("adamw-seed-1", "sam-seed-2", "adamw-seed-2", "sam-seed-3"))
    assert [adamw.name, sam.name] == ["adamw", "sam"]
    assert [[one.name for one in both] for both in pair(adamw, sam)] == [["adamw-seed-2", "sam-seed-2"]]
    (plain,) = group_by_seed(named("plain"))
    assert [[one.name for one in both] for both in pair(adamw, plain)] == [["adamw-seed-1", "plain"]]


def test_a_pattern_of_ones_own():
    found = group_by_seed(named("sam.1", "sam.2", "x"), r"(?P<method>\w+)\.(?P<seed>\d)")
    assert [(one.name, list(one.by_seed)) for one in found] == [("sam", [1, 2]), ("x", [None])]


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "is not a regular expression"), (r"(?P<method>.*)", r"needs the groups .*seed")]
)
def test_a_wrong_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        group_by_seed(named("a"), pattern)


def test_a_seed_is_there_once():
    with pytest.raises(ValueError, match="'sam-seed-1' and 'sam_seed_1' are of one method and one seed"):
        group_by_seed(named("sam-seed-1", "sam_seed_1"))
