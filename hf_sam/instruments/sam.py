"""SAM sharpness: how much the loss grows at the worst nearby weights, to first order (arXiv 2010.01412, eq. 2)."""

from dataclasses import dataclass

import torch

from ..runtime.sharding import check_unsharded
from ..statistics.losses import HeldOutLoss
from ..step.perturbation import Fragment, apply, ascent_scale, squared_norms
from ..step.variants import DEFAULT, Variant, get_variant
from .displacement import floating_parameters
from .gradients import check_precise, loss_gradient
from .loss import held_out_loss
from .measuring import measuring
from .registry import Column, Instrument, Setting, number, register


@dataclass(frozen=True)
class SAMSharpness:
    """Loss at w and at w + e, with e = rho g / ||g|| or that of another variant.

    Attributes:
        loss, perturbed_loss (`float`): nats per token.
        gradient_norm (`float`): the norm that the variant divides by; SAM: ||g||.
        rho (`float`): radius.
        variant (`str`): name of the variant.
    """

    loss: float
    perturbed_loss: float
    gradient_norm: float
    rho: float
    variant: str = DEFAULT

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
    variant: str = DEFAULT,
    batch_size: int = 8,
    parameters: str | None = None,
) -> SAMSharpness:
    """Loss at w + e minus loss at w, both over all of the data, with e along the gradient over all of the data.

    Memory: one copy of the perturbed weights, which holds the gradient first and then w.

    Args:
        model (`torch.nn.Module`): a causal language model, whole on each process.
        data: held-out data; see [`held_out_loss`].
        rho (`float`, defaults to 0.05): radius of the perturbation.
        variant (`str`, defaults to `"sam"`): what e is, a name in [`hf_sam.step.variants`](~hf_sam.step.variants).
        batch_size (`int`, defaults to 8): rows per batch.
        parameters (`str`, *optional*): regular expression of the weights to perturb; all when omitted.

    Raises:
        ValueError: if `rho` is not positive, the variant is unknown, or weights are quantized, in 16 bits, or sharded.
        FloatingPointError: if the gradient is not finite.
    """
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho={rho} must be a positive number.")
    perturbation = get_variant(variant)
    if perturbation.passes != 2 or perturbation.moments:
        raise ValueError(
            f"SAM sharpness follows the gradient of the data, which does not determine the variant {variant!r}. Use "
            "'sam' or 'asam'."
        )
    with measuring(model, exact=True) as inner:
        params = floating_parameters(inner, parameters, "SAM sharpness")
        check_precise(params, "SAM sharpness")
        check_unsharded(params, "SAM sharpness")
        before = held_out_loss(inner, data, batch_size=batch_size)
        gradient = loss_gradient(inner, params, data, batch_size)
        norm, after = _loss_at_ascent(inner, params, gradient, data, rho, perturbation, batch_size)
    return SAMSharpness(before.loss, after.loss, norm, float(rho), variant)


@torch.no_grad()
def _loss_at_ascent(
    model,
    params: dict[str, torch.nn.Parameter],
    gradient: dict[str, torch.Tensor],
    data,
    rho: float,
    variant: Variant,
    batch_size: int,
) -> tuple[float, HeldOutLoss]:
    fragments = [Fragment(name, param, param, gradient[name]) for name, param in params.items()]
    squares = torch.stack([square.double() for square in squared_norms(fragments, variant)])
    norm = squares.sum().sqrt()
    if not torch.isfinite(norm):
        raise FloatingPointError(f"The gradient of the held-out loss has norm {norm}; the model cannot be perturbed.")
    scale = ascent_scale(rho, norm, torch.isfinite(norm)).to(fragments[0].weight.dtype)
    origins: dict[str, torch.Tensor] = {}
    try:
        for fragment in fragments:
            origins[fragment.name] = origin = fragment.weight.clone()
            apply([Fragment(fragment.name, fragment.weight, origin, fragment.grad)], variant, scale, norm.isfinite())
            # e has been used, so its storage can hold w: only one weight at a time is in memory three times.
            origins[fragment.name] = fragment.grad.copy_(origin)
        return norm.item(), held_out_loss(model, data, batch_size=batch_size)
    finally:
        try:
            _restore(params, origins)
        except BaseException:
            _restore(params, origins)  # a second interrupt must leave no weight perturbed
            raise


@torch.no_grad()
def _restore(params: dict[str, torch.nn.Parameter], origins: dict[str, torch.Tensor]) -> None:
    for name, origin in origins.items():
        params[name].copy_(origin)


register(
    Instrument(
        name="sam",
        passes=4,
        group="sharpness",
        help="growth of the loss at w + e",
        measure=lambda model, data, **options: sam_sharpness(model, data, **options).to_dict(),
        settings=(
            Setting(
                "sam_rho",
                0.05,
                "Radius of --sharpness sam.",
                lambda value: None if 0 < value < float("inf") else "must be a positive number",
            ),
        ),
        depends_on=("sharpness_documents",),
        options=lambda settings: {"rho": settings.sam_rho},
        columns=(Column("SAM sharpness", lambda found: number(found["value"])),),
        note="SAM sharpness is the growth of the loss at w + e, the point at distance rho along the gradient.",
        scalars=lambda found: {"sam": found["value"]},
        fp32=True,
        whole=True,
    )
)
