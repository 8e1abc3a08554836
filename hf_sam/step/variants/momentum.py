"""MSAM: the perturbation follows the momentum, without an ascent pass (Becker et al. 2024, arXiv 2401.12033)."""

import torch

from .base import Variant


class Momentum(Variant):
    r"""\\(e = -\rho m / \|m\|\\), where m is the first moment of the optimizer before its step.

    In the first step of an optimizer, m is 0, and so is e.
    """

    name = "momentum"
    equation = "e = -rho * m / ||m||"
    source = "arXiv 2401.12033, algorithm 1"
    passes = 1
    moments = ("first",)

    def squared_norm(self, piece):
        return torch.linalg.vector_norm(piece.moment("first")).square()

    def to_direction(self, pieces):
        directions = torch._foreach_neg([piece.moment("first") for piece in pieces])
        for piece, direction in zip(pieces, directions, strict=True):
            piece.gradient = direction
