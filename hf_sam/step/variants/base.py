"""The contract of a variant: what the perturbation e is.

Every variant has the form e = rho * d / ||n||, with a direction d and a vector n that are computed elementwise from the
weights w and the ascent gradient g; ||n|| is taken over all perturbed weights of all ranks. The variant says what d and
n are. Where the weights live, in which precision they are stored and how ||n|| is summed over the ranks is the
business of the backends and of [`~hf_sam.step.perturbation`], which hand over the weights piece by piece.
"""

import abc
from typing import ClassVar

import torch


class Piece:
    """Matching pieces of the weights and of the ascent gradient, in fp32 (fp64 for fp64 weights).

    Args:
        name (`str`): name of the parameter.
        master (`torch.Tensor`): w in any precision, on any device.
        gradient (`torch.Tensor`): g, of the same shape.
        pairs (`bool`): whether the last dimension holds real and imaginary parts of complex weights.

    Attributes:
        gradient (`torch.Tensor`): g; [`Variant.turn`] overwrites it with d.
    """

    def __init__(self, name: str, master: torch.Tensor, gradient: torch.Tensor, pairs: bool = False):
        self.name = name
        self.pairs = pairs
        self._master = master
        self._weight: torch.Tensor | None = None
        dtype = torch.promote_types(torch.float32, torch.promote_types(master.dtype, gradient.dtype))
        self.gradient = gradient.to(dtype)

    @property
    def weight(self) -> torch.Tensor:
        """w where the gradient is, in its precision; must not be changed."""
        if self._weight is None:  # offloaded weights travel only if they are asked for
            self._weight = self._master.to(self.gradient.device, self.gradient.dtype)
        return self._weight

    @property
    def magnitude(self) -> torch.Tensor:
        """|w| up to its sign: w itself for real weights, the modulus in both places for complex ones."""
        if not self.pairs:
            return self.weight
        squares = self.weight.square().view(-1, 2).sum(dim=1, keepdim=True)
        return squares.sqrt().expand(-1, 2).reshape(self.weight.shape)


class Variant(abc.ABC):
    """One way to perturb the weights. A subclass stands in a file of its own and is registered by its name.

    Class attributes:
        name (`str`): the value of `sam_variant` that selects it.
        equation (`str`): e in terms of rho, w and g.
        source (`str`): paper and equation.
        passes (`int`): passes over a micro-batch that it needs: 2, the ascent and the descent pass.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    passes: ClassVar[int] = 2

    @abc.abstractmethod
    def squared_norm(self, piece: Piece) -> torch.Tensor:
        """||n||^2 of a piece, shape `()`."""

    @abc.abstractmethod
    def turn(self, pieces: list[Piece]) -> None:
        """Turn the gradients of all pieces into d, in place and without waiting for the device."""

    def state_dict(self) -> dict:
        """What a resumed run needs; part of [`SAMStep.state_dict`]."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027  (most variants have no state)
        """Go on from `state_dict`."""
