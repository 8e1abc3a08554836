"""SAM: the perturbation follows the gradient (Foret et al. 2021, arXiv 2010.01412)."""

import torch

from .base import Variant


class SAM(Variant):
    r"""\\(e = \rho g / \|g\|\\): direction and norm are those of the gradient."""

    name = "sam"
    equation = "e = rho * g / ||g||"
    source = "arXiv 2010.01412, eq. 2"

    def squared_norm(self, piece):
        return torch.linalg.vector_norm(piece.gradient).square()

    def to_direction(self, pieces):
        pass  # d = g
