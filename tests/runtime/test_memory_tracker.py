"""The tests' own measure of memory."""

import torch
from memory import peak_bytes


def test_what_lives_at_one_time_counts():
    def hold(count):
        kept = []
        for _ in range(count):
            kept.append(torch.zeros(1000) + 1)  # the zeros are freed again
        return kept

    assert peak_bytes(lambda: hold(1)) == 8000
    assert peak_bytes(lambda: hold(5)) == 4000 * 6
    assert peak_bytes(lambda: [hold(1) and None for _ in range(5)]) == 8000


def test_views_and_changes_in_place_cost_nothing():
    weight = torch.zeros(1000)
    assert peak_bytes(lambda: weight.view(10, 100).add_(1).t()) == 0
