"""The moments of an optimizer: its running averages of the gradient and of the squared gradient."""

import inspect
from collections.abc import Iterable

import torch

from ..runtime.sharding import is_uncompressed

# Names of each moment in the state of optimizers of torch, DeepSpeed and others.
_NAMES = {"first": ("exp_avg", "momentum_buffer"), "second": ("exp_avg_sq", "square_avg")}


def moments_of(param: torch.Tensor, optimizers: Iterable, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The moments of a parameter; empty if no optimizer has stepped it yet.

    Args:
        param (`torch.Tensor`): a parameter of one of the optimizers.
        optimizers (`Iterable[torch.optim.Optimizer]`): the optimizers that may train it.
        wanted (`tuple[str, ...]`): `"first"` (average of the gradient), `"second"` (average of the squared gradient).

    Returns:
        `dict[str, torch.Tensor]`: the moments by kind, each of the shape of `param`.

    Raises:
        ValueError: if the optimizer that trains the parameter does not keep a moment.
    """
    for optimizer in map(_unwrapped, optimizers if wanted else ()):
        state = optimizer.state.get(param)
        if state:
            return _found(optimizer, state, wanted, param.shape)
    return {}


def check_optimizer(optimizer: torch.optim.Optimizer, wanted: tuple[str, ...]) -> None:
    """Check that an optimizer keeps the moments: by its state, or before its first step by that of a small one.

    Raises:
        ValueError: if it does not; the message names the optimizer and the remedy.
    """
    optimizer = _unwrapped(optimizer)
    stepped = False
    for param, state in getattr(optimizer, "state", {}).items():
        if state and isinstance(param, torch.Tensor):
            _found(optimizer, state, wanted, param.shape)
            stepped = True
    if not stepped:
        for state in _states_after_a_step(optimizer):
            _found(optimizer, state, wanted, torch.Size((2, 2)))


class MomentsCheck:
    """Finds out early, and not in the first SAM step of a long run, whether the optimizer keeps the moments.

    Args:
        wanted (`tuple[str, ...]`): see [`moments_of`]; empty if the run needs none.
    """

    def __init__(self, wanted: tuple[str, ...] = ()):
        self._wanted = wanted
        self._certain = not wanted

    def before_training(self, optimizer) -> None:
        """Check an optimizer that has not stepped; see [`check_optimizer`]."""
        if self._wanted and isinstance(optimizer, torch.optim.Optimizer):
            check_optimizer(optimizer, self._wanted)

    def after_a_step(self, optimizer) -> None:
        """Check an optimizer that has stepped, once; raises ValueError as [`check_optimizer`]."""
        if self._certain:
            return
        check_optimizer(optimizer, self._wanted)
        state = getattr(_unwrapped(optimizer), "state", {})
        if not any(isinstance(param, torch.Tensor) and value for param, value in state.items()):
            raise _refusal(optimizer, self._wanted[0])
        self._certain = True


def _refusal(optimizer, kind: str) -> ValueError:
    found = type(_unwrapped(optimizer))
    name = f"{found.__module__.partition('.')[0]}'s {found.__name__}"
    return ValueError(
        f"This SAM variant uses the {kind} moment of the optimizer, but {name} keeps none in the shape of the weights. "
        "Use an optimizer that does, e.g. AdamW (optim='adamw_torch'), or another sam_variant."
    )


def _unwrapped(optimizer):
    while hasattr(optimizer, "optimizer"):  # wrappers of accelerate and DeepSpeed, Lookahead
        optimizer = optimizer.optimizer
    return optimizer


def _found(optimizer, state: dict, wanted: tuple[str, ...], shape: torch.Size) -> dict[str, torch.Tensor]:
    found = {}
    for kind in wanted:
        values = (state.get(name) for name in _NAMES[kind])
        fitting = (value for value in values if is_uncompressed(value) and value.shape == shape)
        found[kind] = next(fitting, None)
        if found[kind] is None:
            raise _refusal(optimizer, kind)
    return found


def _states_after_a_step(optimizer) -> list[dict]:
    """The states that optimizers with the settings of each group have after a step; empty if they cannot be created."""
    states = []
    try:
        # torch adds defaults that the constructor does not know.
        known = inspect.signature(type(optimizer).__init__).parameters.keys()
        for group in optimizer.param_groups:
            settings = {**optimizer.defaults, **group}
            param = torch.nn.Parameter(torch.zeros(2, 2))
            param.grad = torch.ones(2, 2)
            probe = type(optimizer)([param], **{name: settings[name] for name in known & settings.keys() - {"params"}})
            probe.step()
            states.append(dict(probe.state[param]))
    except Exception:  # a class with another constructor: its state after the first step is checked
        return []
    return states
