"""The SAM step in its plainest form: one process, fp32, nothing clever. The oracle of the tests.

Read it against Foret et al. (arXiv 2010.01412, algorithm 1) or Kwon et al. (arXiv 2102.11600, algorithm 1). It is slow
and keeps every intermediate value; training goes through [`SAMTrainer`].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ReferenceStep:
    """Result of [`sam_step`].

    Attributes:
        loss (`float`): loss at w, over the micro-batches of the ascent pass.
        perturbed_loss (`float`): loss at w + e, over the same micro-batches.
        ascent_grad_norm (`float`): ||g|| (ASAM: ||w g||).
    """

    loss: float
    perturbed_loss: float
    ascent_grad_norm: float


def sam_step(
    model: torch.nn.Module,
    micro_batches: Sequence[Any],
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor],
    rho: float,
    adaptive: bool = False,
    ascent_micro_batches: int | None = None,
    perturbed_names: set[str] | None = None,
) -> ReferenceStep:
    """Leave the gradient at w + e in the parameters of `model`, and w in their values.

    Args:
        model (`torch.nn.Module`): model whose trainable parameters are w.
        micro_batches (`Sequence`): micro-batches of one optimizer step.
        loss_of (`Callable`): loss of a micro-batch, shape `()`; the losses of all micro-batches add up to the loss of
            the step.
        rho (`float`): radius of the perturbation.
        adaptive (`bool`, defaults to `False`): ASAM instead of SAM.
        ascent_micro_batches (`int`, *optional*): take g over the first so many micro-batches only.
        perturbed_names (`set[str]`, *optional*): names of the parameters to perturb; all trainable ones if omitted.
    """
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if perturbed_names is None:
        perturbed_names = set(trainable)

    def accumulate_gradient(batches) -> list[float]:
        for param in trainable.values():
            param.grad = None
        losses = []
        for batch in batches:
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())
        return losses

    w = {name: param.detach().clone() for name, param in trainable.items()}
    k = len(micro_batches) if ascent_micro_batches is None else ascent_micro_batches

    # Ascent pass: g = grad L(w).
    losses = accumulate_gradient(micro_batches[:k])
    g = {name: trainable[name].grad for name in perturbed_names if trainable[name].grad is not None}

    # e = rho * g / ||g||, or e = rho * |w|^2 g / || |w| g ||.
    scaled = {name: w[name].abs() * grad if adaptive else grad for name, grad in g.items()}
    norm = torch.sqrt(sum((s.abs() ** 2).sum() for s in scaled.values()))
    e = {name: rho * (w[name].abs() * s if adaptive else s) / (norm + 1e-12) for name, s in scaled.items()}

    # Descent pass: grad L(w + e), left in the parameters.
    with torch.no_grad():
        for name in e:
            trainable[name].copy_(w[name] + e[name])
    perturbed_losses = accumulate_gradient(micro_batches)
    with torch.no_grad():
        for name in e:
            trainable[name].copy_(w[name])
    return ReferenceStep(loss=sum(losses), perturbed_loss=sum(perturbed_losses[:k]), ascent_grad_norm=norm.item())
