"""SAM: the perturbation follows the gradient (Foret et al. 2021, arXiv 2010.01412)."""

import torch

from .base import Variant


class SAM(Variant):
    r"""\\(e = \rho g / \|g\|\\): direction and norm are those of the gradient."""

    name = "sam"
    equation = "e = rho * g / ||g||"
    source = "arXiv 2010.01412, eq. 2"

    def norms(self, pieces):
        return torch._foreach_norm([piece.gradient for piece in pieces])

    def to_direction(self, pieces):
        pass  # d = g
