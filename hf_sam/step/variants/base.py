"""The interface of a variant, which defines the perturbation e.

Every variant has the form e = rho * d / ||n||. The variant defines the direction d and the vector n, both computed
elementwise from the weights w and, as the variant needs them, from the ascent gradient g, the moments of the optimizer
and random numbers; ||n|| is the norm over all perturbed weights of all ranks. Backends and
[`~hf_sam.step.perturbation`] handle sharding, precision and the reduction of ||n||, and pass the weights to the variant
piece by piece.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import torch


class Piece:
    """Matching pieces of the weights and of what the variant needs, in fp32 (fp64 for fp64 weights).

    Args:
        name (`str`): name of the parameter.
        master (`torch.Tensor`): w in any precision, on any device.
        gradient (`torch.Tensor` or `None`): g, of the same shape; `None` without an ascent pass.
        pairs (`bool`): whether the last dimension holds real and imaginary parts of complex weights.
        moments (`dict[str, torch.Tensor]`): moments of the optimizer, each of the same shape, on any device.
        noise (`Callable[[], torch.Tensor]`, *optional*): draws random numbers of mean 0 and variance 1, same shape.
        stored (`torch.Tensor`, *optional*): the weights that are perturbed, of the same shape.

    Attributes:
        gradient (`torch.Tensor` or `None`): g; [`Variant.to_direction`] overwrites it with d.
        device (`torch.device`): where e is computed.
    """

    def __init__(
        self,
        name: str,
        master: torch.Tensor,
        gradient: torch.Tensor | None,
        pairs: bool = False,
        moments: dict[str, torch.Tensor] | None = None,
        noise: Callable[[], torch.Tensor] | None = None,
        stored: torch.Tensor | None = None,
    ):
        self.name = name
        self.pairs = pairs
        self.master = master
        self._weight: torch.Tensor | None = None
        self._moments = moments or {}
        self._noise = noise
        self.stored = stored
        self.dtype = torch.promote_types(torch.float32, master.dtype)
        self.gradient, self.device = None, (master if stored is None else stored).device
        if gradient is not None:
            self.dtype = torch.promote_types(self.dtype, gradient.dtype)
            self.gradient, self.device = gradient.to(self.dtype), gradient.device

    @property
    def weight(self) -> torch.Tensor:
        """w on the device and in the precision of the gradient. Do not modify it."""
        if self._weight is None:  # lazy, because offloaded weights are copied to the device
            self._weight = self.master.to(self.device, self.dtype)
        return self._weight

    @property
    def magnitude(self) -> torch.Tensor:
        """|w| up to the sign: w itself for real weights; for complex weights, the modulus in both entries."""
        if not self.pairs:
            return self.weight
        squares = self.weight.square().reshape(-1, 2).sum(dim=1, keepdim=True)
        return squares.sqrt().expand(-1, 2).reshape(self.weight.shape)

    def moment(self, kind: str) -> torch.Tensor:
        """The `"first"` or `"second"` moment of the optimizer; 0 before its first step. Do not modify it."""
        if kind not in self._moments:
            return torch.zeros(self.master.shape, dtype=self.dtype, device=self.device)
        return self._moments[kind].to(self.device, self.dtype)

    def noise(self) -> torch.Tensor:
        """The random numbers of `sam_noise`: mean 0 and variance 1, the same in each call; shape of the weights."""
        return self._noise().view(self.master.shape)


class Variant(abc.ABC):
    """Base class of the variants. Each subclass has its own file and is registered by its name.

    Class attributes:
        name (`str`): the value of `sam_variant` that selects it.
        equation (`str`): e as a function of rho, w and g.
        source (`str`): paper and equation.
        passes (`int`): number of passes over each micro-batch: 2, the ascent and the descent pass, or 1, if e does not
            depend on an ascent gradient.
        moments (`tuple[str, ...]`): moments of the optimizer that e depends on: `"first"`, `"second"`.
        sign (`float`): factor of d; -1 if e points against it.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    passes: ClassVar[int] = 2
    moments: ClassVar[tuple[str, ...]] = ()
    sign: ClassVar[float] = 1.0

    @abc.abstractmethod
    def norms(self, pieces: list[Piece]) -> list[torch.Tensor]:
        """||n|| of each piece, each of shape `()`, without waiting for the device."""

    @abc.abstractmethod
    def to_direction(self, pieces: list[Piece]) -> None:
        """Make the gradient of each piece d, in place and without waiting for the device.

        With one pass there is no gradient. Then assign d, which is not modified afterwards and so may be a moment.
        """

    def state_dict(self) -> dict:
        """The state that a resumed run needs; part of [`SAMStep.state_dict`]."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027  (most variants have no state)
        """Load a state from `state_dict`."""
