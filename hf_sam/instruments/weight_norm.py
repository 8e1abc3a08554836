"""Norm of the weights: sharpness depends on their scale, so that models of other norms compare badly."""

import torch

from .displacement import floating_parameters
from .measuring import measuring
from .registry import Column, Instrument, number, register


def weight_norm(model: torch.nn.Module, *, parameters: str | None = None) -> dict[str, float]:
    """Frobenius norms of the weights.

    Args:
        model (`torch.nn.Module`): a model with unsharded floating-point weights.
        parameters (`str`, *optional*): regular expression of the weights; all when omitted.

    Returns:
        `dict[str, float]`: `norm` of all, and `matrices`: of the tensors of two dimensions without embeddings.
    """
    with measuring(model) as inner, torch.no_grad():
        params = floating_parameters(inner, parameters, "The norm of the weights")
        squares = {name: param.double().square().sum().item() for name, param in params.items()}
        tables = {id(module.weight) for module in inner.modules() if isinstance(module, torch.nn.Embedding)}
        matrices = [name for name, param in params.items() if param.ndim == 2 and id(param) not in tables]
    return {"norm": sum(squares.values()) ** 0.5, "matrices": sum(squares[name] for name in matrices) ** 0.5}


register(
    Instrument(
        name="norm",
        passes=0,
        group="sharpness",
        help="norm of the weights, which sharpness depends on",
        measure=lambda model, data, batch_size: weight_norm(model),
        depends_on=(),
        columns=(
            Column("weight norm", lambda found: number(found["norm"])),
            Column("of the matrices", lambda found: number(found["matrices"])),
        ),
        note="Norms are Frobenius norms, of all weights and of the matrices without embeddings.",
        scalars=lambda found: {"weight_norm": found["norm"]},
        whole=True,
    )
)
