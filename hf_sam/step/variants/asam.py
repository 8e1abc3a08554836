"""Adaptive SAM: the perturbation scales with the magnitude of each weight (Kwon et al. 2021, arXiv 2102.11600)."""

import torch

from .base import Variant


class ASAM(Variant):
    r"""\\(e = \rho |w|^2 g / \| |w| g \|\\), elementwise; the perturbed loss is invariant to rescaling of layers."""

    name = "asam"
    equation = "e = rho * |w|^2 g / || |w| g ||"
    source = "arXiv 2102.11600, eq. 8"

    def norms(self, pieces):
        return [torch.linalg.vector_norm(piece.magnitude * piece.gradient) for piece in pieces]

    def to_direction(self, pieces):
        gradients, magnitudes = [p.gradient for p in pieces], [p.magnitude for p in pieces]
        torch._foreach_mul_(gradients, magnitudes)
        torch._foreach_mul_(gradients, magnitudes)
