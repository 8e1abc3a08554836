"""How far a step perturbs the weights. The values may be changed between steps."""

import numbers

from .argument_checks import describe


class Strength:
    """Radius, noise and rise of the loss, each checked when it is set."""

    @property
    def rho(self) -> float:
        """Radius of the perturbation; 0 means a plain step, or noise only."""
        return self._rho

    @rho.setter
    def rho(self, value: float):
        self._rho = _checked("rho", "the radius of the perturbation", value, infinite=True)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise, relative to each weight; 0 means none."""
        return self._noise

    @noise.setter
    def noise(self, value: float):
        self._noise = _checked("noise", "the relative noise on the weights", value)

    @property
    def loss_rise(self) -> float:
        """Rise of the loss that determines the radius, in nats; 0 means that `rho` is the radius."""
        return self._loss_rise

    @loss_rise.setter
    def loss_rise(self, value: float):
        self._loss_rise = _checked("loss_rise", "the rise of the loss", value)

    def check_radius(self) -> None:
        """Raises ValueError if nothing limits the radius."""
        if self.rho == float("inf") and not self.loss_rise:
            raise ValueError("rho=inf must be a finite number; only with loss_rise it may be infinite.")


def _checked(name: str, what: str, value, infinite: bool = False):
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {what}, a number, but got {describe(value)}.")
    if not 0 <= value <= float("inf") or (value == float("inf") and not infinite):
        raise ValueError(f"{name}={value} must be a finite number, 0 or larger.")
    return value
