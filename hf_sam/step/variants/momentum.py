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
    sign = -1.0

    def norms(self, pieces):
        return torch._foreach_norm([piece.moment("first") for piece in pieces])

    def to_direction(self, pieces):
        for piece in pieces:
            piece.gradient = piece.moment("first")
