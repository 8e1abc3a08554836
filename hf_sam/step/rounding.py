"""Stochastic rounding: how a perturbation survives in 16-bit weights.

A SAM perturbation is tiny next to a weight: rho / sqrt(number of weights) per coordinate, far below the spacing
of bf16 numbers. Round-to-nearest then returns the old weight almost everywhere and the climb silently does not
happen. Stochastic rounding moves to the next representable number with a probability equal to the fraction of
the spacing that was asked for, so that the expectation of the stored value is the value asked for.
"""

import torch

# Scratch memory is a few fp32 tensors of this many elements, whatever the size of the weight.
_CHUNK_ELEMENTS = 1 << 24

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether `dtype` is a 16-bit floating-point type, too coarse to hold a perturbation by itself."""
    return dtype in _LOW_PRECISION


def stochastic_round(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Round fp32 `values` to `dtype` so that the result is unbiased: `E[result] == values`.

    Args:
        values (`torch.Tensor`): fp32 tensor of any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        generator (`torch.Generator`, *optional*): source of randomness on the device of `values`; the global
            stream when omitted.

    Returns:
        `torch.Tensor`: tensor of `dtype` and of the shape of `values`. Values that `dtype` holds exactly, and
        non-finite values, come back unchanged; a value beyond the largest finite number rounds as a plain cast
        does.

    Raises:
        ValueError: if `dtype` is not a 16-bit floating-point type.
    """
    if not is_low_precision(dtype):
        raise ValueError(f"stochastic_round rounds to torch.bfloat16 or torch.float16, not to {dtype}.")
    nearest = values.to(dtype)
    error = values - nearest.float()
    # In sign-magnitude floating point the neighbour away from zero is the next integer, the one towards zero the
    # previous integer. The nearest value keeps the sign of `values` even at zero, so this also crosses subnormals.
    away_from_zero = (error > 0) == ~torch.signbit(nearest)
    bits = nearest.view(torch.int16)
    neighbour = torch.where(away_from_zero, bits + 1, bits - 1).view(dtype)
    spacing = (neighbour.float() - nearest.float()).abs()
    draw = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float32)
    # An exact value has error 0, and NaN and infinity give a NaN comparison: neither ever moves.
    return torch.where(draw * spacing < error.abs(), neighbour, nearest)


def chunks(*tensors: torch.Tensor):
    """Yield matching flat pieces of tensors of one shape, so that fp32 scratch copies stay small.

    Pieces are views where all tensors are contiguous; otherwise the tensors come back whole, in one piece.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(_CHUNK_ELEMENTS) for tensor in tensors), strict=True)
    else:
        yield tensors
