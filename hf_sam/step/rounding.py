"""Stochastic rounding, which preserves the perturbation of 16-bit weights on average.

A SAM perturbation is about rho / sqrt(number of weights) per weight, far below the spacing of bf16 numbers. Rounding to
nearest would leave almost all weights unchanged, so there would be no ascent step. Stochastic rounding moves a weight
to the next representable number with a probability equal to the requested fraction of the spacing, so the expected
value is exact.
"""

import torch

# Limits scratch memory to a few fp32 tensors of this many elements, for weights of any size.
_CHUNK_ELEMENTS = 1 << 24

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether `dtype` is bf16 or fp16, which are too coarse for a perturbation without stochastic rounding."""
    return dtype in _LOW_PRECISION


def stochastic_round(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Round fp32 `values` to `dtype` so that the result is unbiased: `E[result] == values`.

    Args:
        values (`torch.Tensor`): fp32 tensor of any shape.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        generator (`torch.Generator`, *optional*): random generator on the device of `values`; the global one when
            omitted.

    Returns:
        `torch.Tensor`: tensor of `dtype`, shape of `values`. Non-finite values and values that `dtype` represents
        exactly are unchanged; a value beyond the largest finite number rounds as in a plain cast.

    Raises:
        ValueError: if `dtype` is not a 16-bit floating-point type.
    """
    if not is_low_precision(dtype):
        raise ValueError(f"stochastic_round rounds to torch.bfloat16 or torch.float16, not to {dtype}.")
    nearest = values.to(dtype)
    error = values - nearest.float()
    # Read as integers, the neighbour away from zero is the next integer, the neighbour towards zero the previous one.
    # This holds for subnormals, too, because the nearest value keeps the sign of `values` even at zero.
    away_from_zero = (error > 0) == ~torch.signbit(nearest)
    bits = nearest.view(torch.int16)
    neighbour = torch.where(away_from_zero, bits + 1, bits - 1).view(dtype)
    spacing = (neighbour.float() - nearest.float()).abs()
    draw = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float32)
    # Exact values have error 0, and a comparison with NaN is False: neither moves.
    return torch.where(draw * spacing < error.abs(), neighbour, nearest)


def chunks(*tensors: torch.Tensor):
    """Split tensors of equal shape into matching flat chunks, so that fp32 scratch copies stay small.

    Chunks are views. If the tensors are small, or one is not contiguous, they are the only chunk as they are.
    """
    if tensors[0].numel() > _CHUNK_ELEMENTS and all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(_CHUNK_ELEMENTS) for tensor in tensors), strict=True)
    else:
        yield tensors
