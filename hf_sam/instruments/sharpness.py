"""SAM sharpness: how much the loss grows at the worst nearby weights, to first order (arXiv 2010.01412, eq. 2)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..runtime.distributed import all_reduce_sum
from ..runtime.sharding import check_whole
from ..statistics.losses import HeldOutLoss
from ..step.perturbation import NORM_EPSILON
from .data import shared_batches
from .displacement import floating_parameters
from .loss import count_tokens, held_out_loss, summed_loss
from .measuring import measuring


@dataclass(frozen=True)
class SAMSharpness:
    """Loss at w and at w + e, with e = rho g / ||g||.

    Attributes:
        loss, perturbed_loss (`float`): nats per token.
        gradient_norm (`float`): ||g|| (adaptive: ||w g||).
        rho (`float`): radius.
        adaptive (`bool`): ASAM.
    """

    loss: float
    perturbed_loss: float
    gradient_norm: float
    rho: float
    adaptive: bool = False

    @property
    def value(self) -> float:
        """Perturbed minus clean loss, in nats per token."""
        return self.perturbed_loss - self.loss

    def to_dict(self) -> dict:
        """For JSON."""
        return {"value": self.value, **vars(self)}


def sam_sharpness(
    model: torch.nn.Module,
    data,
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    batch_size: int = 8,
    parameters: str | None = None,
) -> SAMSharpness:
    """Loss at w + e minus loss at w, both over all of the data, with e along the gradient over all of the data.

    Memory: one copy of the perturbed weights (the gradient; where it has been used, w itself takes its place).

    Args:
        model (`torch.nn.Module`): a causal language model, whole on each process.
        data: what to measure on; see [`held_out_loss`].
        rho (`float`, defaults to 0.05): radius of the perturbation.
        adaptive (`bool`, defaults to `False`): ASAM (arXiv 2102.11600, eq. 8): e = rho w^2 g / ||w g||.
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights to perturb; all when omitted.

    Raises:
        ValueError: if `rho` is not positive, or weights are quantized, in 16 bits, or sharded.
    """
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho={rho} must be a positive number.")
    with measuring(model, exact=True) as inner:
        params = floating_parameters(inner, parameters, "SAM sharpness")
        check_precise(params, "SAM sharpness")
        check_whole(params, "SAM sharpness")
        before = held_out_loss(inner, data, batch_size=batch_size)
        gradient = loss_gradient(inner, params, data, batch_size)
        norm, after = _loss_at_ascent(inner, params, gradient, data, rho, adaptive, batch_size)
    return SAMSharpness(before.loss, after.loss, norm, float(rho), adaptive)


def loss_gradient(
    model: torch.nn.Module, params: dict[str, torch.nn.Parameter], data, batch_size: int
) -> dict[str, torch.Tensor]:
    """Gradient of the loss per token over all of the data and processes; the model's own `.grad` stay as they are."""
    tokens = count_tokens(data, batch_size)
    with only_trainable(model, params):
        for batch, counts in shared_batches(data, batch_size, "gradient"):
            if counts:
                (summed_loss(model, batch) / tokens).backward()
        # Summed in place and taken from the parameters one by one: there is never a second copy.
        gradient = {}
        for name, param in params.items():
            value, param.grad = param.grad, None
            gradient[name] = all_reduce_sum(torch.zeros_like(param) if value is None else value)
    return gradient


@contextlib.contextmanager
def only_trainable(model: torch.nn.Module, params: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, exactly `params` require gradients, and have none; afterwards all is as before.

    Raises:
        ValueError: if an optimizer steps in the backward pass, which would change the weights.
    """
    chosen = set(params.values())
    before = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    if any(getattr(param, "_post_accumulate_grad_hooks", None) for param in chosen):
        raise ValueError(
            "An optimizer steps in the backward pass of this model, which a measurement would set off. Measure a model "
            "without it, e.g. one that is loaded anew."
        )
    try:
        for param, _, _ in before:
            param.requires_grad_(param in chosen)
            param.grad = None
        yield
    finally:
        for param, flag, grad in before:
            param.requires_grad_(flag)
            param.grad = grad


def check_precise(params: dict[str, torch.nn.Parameter], what: str) -> None:
    """Raises ValueError for weights in 16 bits, whose rounding would be measured instead."""
    coarse = [name for name, param in params.items() if torch.finfo(param.dtype).bits < 32]
    if coarse:
        raise ValueError(
            f"{what} needs fp32 weights, but {coarse[0]!r} is in {params[coarse[0]].dtype}. Load the model with "
            "dtype=torch.float32."
        )


@torch.no_grad()
def _loss_at_ascent(model, params, gradient, data, rho, adaptive, batch_size) -> tuple[float, HeldOutLoss]:
    norms = [(params[name] * value if adaptive else value).norm().double() for name, value in gradient.items()]
    norm = torch.stack(norms).norm().item()
    if not norm < float("inf"):
        raise FloatingPointError(f"The gradient of the held-out loss has norm {norm}; the model cannot be perturbed.")
    scale = rho / (norm + NORM_EPSILON)
    origins: dict[str, torch.Tensor] = {}
    try:
        for name, param in params.items():
            # e is added, and w moves into the storage of the gradient.
            e = gradient[name].mul_(scale)
            if adaptive:
                e.mul_(param).mul_(param)
            perturbed = param + e
            e.copy_(param)
            origins[name] = e
            param.copy_(perturbed)
        return norm, held_out_loss(model, data, batch_size=batch_size)
    finally:
        try:
            _put_back(params, origins)
        except BaseException:
            _put_back(params, origins)  # interrupted once more: no weight must stay perturbed
            raise


@torch.no_grad()
def _put_back(params: dict[str, torch.nn.Parameter], origins: dict[str, torch.Tensor]) -> None:
    for name, origin in origins.items():
        params[name].copy_(origin)
