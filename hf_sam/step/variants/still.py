"""No direction: for steps that only add noise to the weights."""

import torch

from .base import Variant


class Still(Variant):
    """e = 0. Not registered."""

    name = "still"
    equation = "e = 0"
    source = ""
    passes = 1

    def norms(self, pieces):
        return [torch.zeros((), device=piece.device) for piece in pieces]

    def to_direction(self, pieces):
        pass  # without a gradient, d = 0
