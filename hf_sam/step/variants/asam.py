"""Adaptive SAM: a perturbation in proportion to each weight (Kwon et al. 2021, arXiv 2102.11600)."""

import torch

from .base import Variant


class ASAM(Variant):
    r"""\\(e = \rho |w|^2 g / \| |w| g \|\\), elementwise: rescaling a layer does not change the perturbed loss."""

    name = "asam"
    equation = "e = rho * |w|^2 g / || |w| g ||"
    source = "arXiv 2102.11600, eq. 8"

    def squared_norm(self, piece):
        return torch.linalg.vector_norm(piece.magnitude * piece.gradient).square()

    def turn(self, pieces):
        gradients, magnitudes = [p.gradient for p in pieces], [p.magnitude for p in pieces]
        torch._foreach_mul_(gradients, magnitudes)
        torch._foreach_mul_(gradients, magnitudes)
