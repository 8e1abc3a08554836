"""Plain reference implementation of the SAM step: one process, fp32. The tests compare every backend with it.

Follows Foret et al. (arXiv 2010.01412, algorithm 1), Kwon et al. (arXiv 2102.11600, algorithm 1), Becker et al. (arXiv
2401.12033, algorithm 1) and, for `loss_rise`, Wang et al. (arXiv 2605.10183). It is slow and keeps every intermediate
value; use [`~hf_sam.SAMTrainer`] for training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# w, g or a moment of the optimizer, by parameter name.
Vectors = dict[str, torch.Tensor]


def sam(w: Vectors, g: Vectors, rho: float, moments: dict[str, Vectors]) -> tuple[Vectors, torch.Tensor]:
    """e = rho * g / ||g|| (Foret et al., arXiv 2010.01412, eq. 2), and ||g||."""
    norm = _norm(g)
    return {name: rho * g[name] / (norm + 1e-12) for name in g}, norm


def asam(w: Vectors, g: Vectors, rho: float, moments: dict[str, Vectors]) -> tuple[Vectors, torch.Tensor]:
    """e = rho * |w|^2 g / || |w| g || (Kwon et al., arXiv 2102.11600, eq. 8), and || |w| g ||."""
    norm = _norm({name: w[name].abs() * g[name] for name in g})
    return {name: rho * w[name].abs() ** 2 * g[name] / (norm + 1e-12) for name in g}, norm


def momentum(w: Vectors, g: Vectors, rho: float, moments: dict[str, Vectors]) -> tuple[Vectors, torch.Tensor]:
    """e = -rho * m / ||m|| (Becker et al., arXiv 2401.12033, algorithm 1), and ||m||; m is the first moment."""
    m = moments["first"]
    norm = _norm(m)
    return {name: -rho * m[name] / (norm + 1e-12) for name in m}, norm


def _norm(vectors: Vectors) -> torch.Tensor:
    return torch.sqrt(sum((vector.abs() ** 2).sum() for vector in vectors.values()))


# Reference of each variant in `hf_sam.step.variants`.
PERTURBATIONS: dict[str, Callable[[Vectors, Vectors, float, dict[str, Vectors]], tuple[Vectors, torch.Tensor]]] = {
    "sam": sam,
    "asam": asam,
    "momentum": momentum,
}
# Variants without an ascent pass.
ONE_PASS = {"momentum"}


@dataclass(frozen=True)
class ReferenceStep:
    """Result of [`sam_step`].

    Attributes:
        loss (`float`): loss at w, summed over the micro-batches of the ascent pass; without one, at w + e over all.
        perturbed_loss (`float`): loss at w + e, summed over the same micro-batches.
        ascent_grad_norm (`float`): norm that the variant divides by (SAM: ||g||).
        radius (`float`): radius of the perturbation.
    """

    loss: float
    perturbed_loss: float
    ascent_grad_norm: float
    radius: float


def sam_step(
    model: torch.nn.Module,
    micro_batches: Sequence[Any],
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor],
    rho: float,
    variant: str = "sam",
    ascent_micro_batches: int | None = None,
    perturbed_names: set[str] | None = None,
    loss_rise: float = 0.0,
    moments: dict[str, Vectors] | None = None,
    noise: Vectors | None = None,
) -> ReferenceStep:
    """Compute the gradient at w + e into `.grad` of the trainable parameters of `model`; their values stay w.

    Args:
        model (`torch.nn.Module`): model whose trainable parameters are w.
        micro_batches (`Sequence`): micro-batches of one optimizer step.
        loss_of (`Callable`): loss of a micro-batch, shape `()`; the loss of the step is the sum over its micro-batches.
        rho (`float`): radius of the perturbation; with `loss_rise` the largest radius.
        variant (`str`, defaults to `"sam"`): name of the perturbation in `PERTURBATIONS`.
        ascent_micro_batches (`int`, *optional*): number of micro-batches that g is computed from; all when omitted.
        perturbed_names (`set[str]`, *optional*): names of the parameters to perturb; all trainable ones when omitted.
        loss_rise (`float`, defaults to 0): if not 0, the radius is `loss_rise` / ||g||, g the gradient of the loss of
            the step (estimated by N/k times that of the k micro-batches of the ascent pass).
        moments (`dict[str, dict[str, torch.Tensor]]`, *optional*): moments of the optimizer, by kind and by name.
        noise (`dict[str, torch.Tensor]`, *optional*): random numbers by name, e gets w * noise in addition. With
            `rho=0`, there is no ascent pass.
    """

    def forward_backward(batch) -> float:
        loss = loss_of(model, batch)
        loss.backward()
        return loss.item()

    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return sam_gradient(
        trainable,
        micro_batches,
        forward_backward,
        rho,
        variant,
        ascent_micro_batches,
        perturbed_names,
        loss_rise,
        moments,
        noise,
    )


def sam_gradient(
    trainable: Vectors,
    micro_batches: Sequence[Any],
    forward_backward: Callable[[Any], float],
    rho: float,
    variant: str = "sam",
    ascent_micro_batches: int | None = None,
    perturbed_names: set[str] | None = None,
    loss_rise: float = 0.0,
    moments: dict[str, Vectors] | None = None,
    noise: Vectors | None = None,
) -> ReferenceStep:
    """[`sam_step`] for a loop with its own backward pass.

    Args:
        trainable (`dict[str, torch.Tensor]`): w by name.
        forward_backward (`Callable`): adds the gradient of a micro-batch to `.grad` and returns its loss.
        micro_batches, rho, variant, ascent_micro_batches, perturbed_names, loss_rise, moments, noise: see
            [`sam_step`].
    """
    w = {name: param.detach().clone() for name, param in trainable.items()}
    k = len(micro_batches) if ascent_micro_batches is None else ascent_micro_batches
    if perturbed_names is None:
        perturbed_names = set(trainable)

    def accumulate_gradient(batches) -> list[float]:
        for param in trainable.values():
            param.grad = None
        return [float(forward_backward(batch)) for batch in batches]

    # Ascent pass: g = grad L(w).
    losses, g = [], {}
    if variant not in ONE_PASS and rho > 0:
        losses = accumulate_gradient(micro_batches[:k])
        g = {name: trainable[name].grad.clone() for name in perturbed_names if trainable[name].grad is not None}
    known = {kind: {name: moment[name] for name in perturbed_names} for kind, moment in (moments or {}).items()}

    # Descent pass: grad L(w + e) into `.grad`.
    e, norm, radius = {}, torch.zeros(()), 0.0
    if rho > 0:
        _, norm = PERTURBATIONS[variant](w, g, 1.0, known)
        radius = min(loss_rise / (norm.item() * len(micro_batches) / k), rho) if loss_rise else rho
        e, norm = PERTURBATIONS[variant](w, g, radius, known)
    if noise is not None:
        zero = torch.zeros(())
        e = {name: e.get(name, zero) + w[name] * noise[name] for name in perturbed_names}
    with torch.no_grad():
        for name in e:
            trainable[name].copy_(w[name] + e[name])
    perturbed_losses = accumulate_gradient(micro_batches)
    with torch.no_grad():
        for name in e:
            trainable[name].copy_(w[name])
    losses = losses or perturbed_losses
    return ReferenceStep(
        loss=sum(losses), perturbed_loss=sum(perturbed_losses[:k]), ascent_grad_norm=norm.item(), radius=radius
    )
