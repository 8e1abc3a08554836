"""95% intervals hold the truth in 92 to 98% of synthetic draws, or there is no interval."""

import numpy as np
import pytest
from toy_sweeps import START, World, lengths, sweeps

from hf_sam.statistics import HeldOutLoss, damage_reduction, forgetting, forgetting_reduction

# Coverage below 92% is a fault. Above 97% an interval is wider than need be, which small samples allow: few documents
# tell little of their own spread. Both with three standard errors of the count.
LOW, HIGH = 0.92, 0.985


def share(hits: list[bool], low: float = LOW, high: float = HIGH) -> float:
    """The share of hits, within the limits up to chance."""
    chance = 3 * np.sqrt(0.05 * 0.95 / len(hits))
    found = float(np.mean(hits))
    assert low - chance <= found <= high + chance
    return found


def growth(generator: np.random.Generator, documents: int, spread: float):
    """Losses before and after: how much a document loses depends on the document, and on its length."""
    tokens = lengths(generator, documents, spread)
    level = 0.05 + 0.08 * generator.standard_normal(documents) + 0.02 * (np.log(tokens) - 5)
    grown = level * tokens + generator.normal(0, 0.6, documents) * np.sqrt(tokens)
    before = 2.5 * tokens.astype(float)
    return HeldOutLoss(before, tokens), HeldOutLoss(before + grown, tokens)


def truth(spread: float) -> float:
    """Mean growth per token of all documents."""
    before, after = growth(np.random.default_rng(99), 4_000_000, spread)
    return after.loss - before.loss


def forgetting_hits(documents: int, spread: float) -> list[bool]:
    """Of 1000 draws, whether those that have an interval hold the truth."""
    generator = np.random.default_rng(documents)
    value = truth(spread)
    estimates = [forgetting(*growth(generator, documents, spread)) for _ in range(1000)]
    return [one.low <= value <= one.high for one in estimates if not one.problem]


@pytest.mark.parametrize(
    ("documents", "spread", "intervals"),
    [
        *((documents, 0.0, 1000) for documents in (5, 10, 20, 50, 200)),
        *((5, 0.5, 600), (10, 0.5, 900), (20, 0.5, 980), (50, 0.5, 1000), (200, 0.5, 1000)),
        *((10, 1.0, 400), (20, 1.0, 700), (50, 1.0, 700), (200, 1.0, 750)),
    ],
)
def test_forgetting(documents, spread, intervals):
    found = forgetting_hits(documents, spread)
    assert len(found) >= intervals
    share(found)


@pytest.mark.parametrize("documents", [5, 10, 20, 50, 200, 1000])
def test_forgetting_where_a_few_long_documents_weigh_most(documents):
    """No interval for most draws. The others lack the longest documents, which cannot be seen: they cover less, but of
    all draws, not more have a wrong interval than 95% allow.
    """
    found = forgetting_hits(documents, 1.6)
    assert len(found) < 500
    assert (len(found) - sum(found)) / 1000 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("documents", [5, 20, 200])
def test_damage(documents):
    """The reduction of a growth that is noisy on its own, of which the reference's is twice as large."""
    generator = np.random.default_rng(documents)
    found = []
    for _ in range(1000):
        before, after = growth(generator, documents, 0.5)
        tokens = before.document_tokens
        large = 2 * (after.document_losses - before.document_losses) + 0.3 * tokens
        small = after.document_losses - before.document_losses + 0.15 * tokens
        small = small + 0.03 * generator.standard_normal(documents) * tokens
        pairs = [(before, HeldOutLoss(before.document_losses + grown, tokens)) for grown in (large, small)]
        estimate = damage_reduction(pairs[:1], pairs[1:])
        if not estimate.problem:
            found.append(estimate.low <= 0.5 <= estimate.high)
    assert len(found) > 500
    share(found)


CASES = [
    # documents, of the task, spread, rates of the reference and of the method, power, ratio, seeds
    (20, 40, 0.0, 3, 3, 2.1, 0.8, 1),
    (50, 50, 0.5, 5, 7, 3.0, 1.0, 1),
    (30, 40, 0.5, 3, 5, 2.1, 0.8, 3),
]
SLOW_CASES = [
    (5, 40, 0.0, 5, 5, 2.1, 0.8, 1),
    (200, 256, 1.0, 3, 9, 3.0, 1.0, 1),
    (200, 256, 1.6, 5, 7, 2.1, 0.8, 1),
    (200, 256, 1.0, 5, 5, 2.1, 0.8, 2),
    (200, 256, 1.0, 5, 7, 2.1, 0.7, 5),
]


def reduction_hits(case, draws: int) -> list[bool]:
    documents, task, spread, reference, method, power, ratio, seeds = case
    generator = np.random.default_rng(documents + seeds)
    world = World(documents, task, spread, power, run_noise=0.03 if seeds > 1 else 0.0)
    start = 2e-4 if reference == method else 1.7e-4
    grids = {
        "reference": (np.geomspace(2e-4, 8e-4, reference), 0.125),
        "method": (np.geomspace(start, 8e-4, method), 0.125 * ratio),
    }
    found = []
    for _ in range(draws):
        drawn = sweeps(world, grids, seeds, generator)
        estimate = forgetting_reduction(drawn["reference"], drawn["method"]).relative
        if not estimate.problem:
            found.append(estimate.low <= 1 - ratio <= estimate.high)
    return found


@pytest.mark.parametrize("case", CASES)
def test_reduction_at_equal_task_loss(case):
    share(reduction_hits(case, 100))


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_two_methods_end(seeds):
    generator = np.random.default_rng(5 + seeds)
    world = World(60, 60, 0.5, 2.1, run_noise=0.03 if seeds > 1 else 0.0)
    rates = np.geomspace(2e-4, 8e-4, 5)
    first, last = START - 0.42 - 0.72 * np.log2(rates[[0, -1]] / 1.5e-4)
    at = np.linspace(last, first, 1001)
    truth = -0.2 * 0.125 * np.mean((START - at) ** 2.1)
    found = []
    for _ in range(100 // seeds):
        drawn = sweeps(world, {"reference": (rates, 0.125), "method": (rates, 0.1)}, seeds, generator)
        estimate = forgetting_reduction(drawn["reference"], drawn["method"]).end_difference
        if not estimate.problem:
            found.append(estimate.low <= truth <= estimate.high)
    share(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_reduction_at_equal_task_loss_with_more_documents(case):
    found = reduction_hits(case, 300 // case[-1])
    assert len(found) > 40
    share(found)
