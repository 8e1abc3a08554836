"""The moments of an optimizer: its running averages of the gradient and of the squared gradient."""

import inspect
from collections.abc import Iterable

import torch

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
    for optimizer in optimizers if wanted else ():
        state = optimizer.state.get(param)
        if state:
            found = {kind: _find(state, kind, param.shape) for kind in wanted}
            _check(found, optimizer)
            return found
    return {}


def check_optimizer(optimizer: torch.optim.Optimizer, wanted: tuple[str, ...]) -> bool:
    """Check, also before its first step, that an optimizer keeps the moments.

    Returns:
        `bool`: whether it is certain; if not, check again after the first step.

    Raises:
        ValueError: if it does not; the message names the optimizer and the remedy.
    """
    while hasattr(optimizer, "optimizer"):  # wrappers of accelerate and DeepSpeed
        optimizer = optimizer.optimizer
    for param, state in optimizer.state.items():
        if state and isinstance(param, torch.Tensor):
            _check({kind: _find(state, kind, param.shape) for kind in wanted}, optimizer)
            return True
    state = _state_after_a_step(optimizer)
    if state is not None:
        _check({kind: _find(state, kind, torch.Size((2, 2))) for kind in wanted}, optimizer)
    return state is not None


def _find(state: dict, kind: str, shape: torch.Size) -> torch.Tensor | None:
    found = (state.get(name) for name in _NAMES[kind])
    return next((value for value in found if isinstance(value, torch.Tensor) and value.shape == shape), None)


def _check(found: dict[str, torch.Tensor | None], optimizer) -> None:
    missing = [kind for kind, value in found.items() if value is None]
    if missing:
        kind = type(optimizer)
        name = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        raise ValueError(
            f"This SAM variant uses the {missing[0]} moment of the optimizer, but {name} keeps none in the shape of "
            "the weights. Use an optimizer that does, e.g. AdamW (optim='adamw_torch'), or another sam_variant."
        )


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> dict | None:
    """The state that an optimizer of this kind has after a step; `None` if one cannot be created for a probe."""
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.ones(2, 2)
    # torch adds defaults that the constructor does not know.
    known = inspect.signature(type(optimizer).__init__).parameters.keys() & optimizer.defaults.keys()
    try:
        probe = type(optimizer)([param], **{name: optimizer.defaults[name] for name in known})
        probe.step()
    except Exception:  # a class with another constructor: the first SAM step finds out
        return None
    return dict(probe.state[param])
