"""Stochastic rounding is unbiased, moves to a neighbour only, and leaves alone what needs no rounding."""

import pytest
import torch

from hf_sam.step import rounding
from hf_sam.step.rounding import chunks, stochastic_round

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.3, -0.3, 1.0001, -2.7e-3, 3e-6, -4.4e-8, 1e-9, 60000.7])
def test_expectation_is_the_value(generator, dtype, value):
    draws = 200_000
    rounded = stochastic_round(torch.full((draws,), value), dtype, generator).double()
    spacing = (rounded.max() - rounded.min()).item()
    # Two neighbours at most, and a mean within five standard errors of the value that was asked for.
    assert len(rounded.unique()) <= 2
    exact = torch.tensor(value, dtype=torch.float32).double().item()
    assert abs(rounded.mean().item() - exact) <= 5 * 0.5 * spacing / draws**0.5 + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_one_of_the_two_neighbours(generator, dtype):
    values = torch.randn(10_000, generator=generator) * torch.logspace(-7, 4, 10_000)
    rounded = stochastic_round(values, dtype, generator)
    nearest = values.to(dtype)
    up = torch.nextafter(nearest, torch.tensor(float("inf"), dtype=dtype))
    down = torch.nextafter(nearest, torch.tensor(float("-inf"), dtype=dtype))
    assert ((rounded == nearest) | (rounded == up) | (rounded == down)).all()
    other_side = (rounded.float() - values) * (nearest.float() - values) <= 0
    assert ((rounded == nearest) | other_side).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_and_non_finite_values_are_unchanged(generator, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, float("inf"), float("-inf"), float("nan")])
    for _ in range(20):
        rounded = stochastic_round(values, dtype, generator).float()
        assert torch.equal(rounded[:6], values[:6])
        assert rounded[6].isnan()


def test_same_generator_state_gives_the_same_result():
    values = torch.randn(1000)
    first, second = (stochastic_round(values, torch.bfloat16, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        stochastic_round(torch.ones(2), torch.float32)


def test_chunks_are_views_that_cover_everything(monkeypatch):
    monkeypatch.setattr(rounding, "_CHUNK_ELEMENTS", 7)
    first, second = torch.zeros(5, 4), torch.arange(20.0).view(5, 4)
    for mine, theirs in chunks(first, second):
        assert mine.numel() <= 7
        mine.copy_(theirs)
    assert torch.equal(first, second)
    transposed = torch.zeros(4, 5).t()
    assert [piece.shape for (piece,) in chunks(transposed)] == [(5, 4)]
