"""Rounding to nearest in groups, from 2 to 8 bits: the simplest quantizer, which needs no package and fits any model.

Asymmetric, from the smallest to the largest weight of a group (0 included); groups lie along the input dimension, the
last one of a row may be smaller. A scale of 16 bits and a zero point of `bits` bits belong to each group. Weights keep
their type, and only their values are rounded.
"""

import functools

import torch
from transformers.pytorch_utils import Conv1D

from .proof import Quantized, matrices, prove, quantizable
from .registry import Held, Quantizer, register

GROUP_SIZE = 128


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int, group_size: int = GROUP_SIZE) -> Quantized:
    """Round the weights of a model in place to 2**bits evenly spaced values in each group, and check that it did.

    Args:
        model (`torch.nn.Module`): in floating point; its embeddings and output layer stay as they are.
        bits (`int`): from 2 to 8.
        group_size (`int`, defaults to 128): weights that share a scale.

    Raises:
        ValueError: if `bits` or `group_size` is out of range, or the model is quantized already.
        MeasurementError: if the model has nothing to quantize, or keeps more values than it should.
    """
    _round(model, bits=bits, group_size=group_size)
    held = functools.partial(_held, bits=bits, group_size=group_size)
    return prove(model, f"rtn{bits}", matrices(model), held)


def _round(model: torch.nn.Module, bits: int, group_size: int = GROUP_SIZE) -> None:
    if not 2 <= bits <= 8 or group_size < 1:
        raise ValueError(f"bits={bits} must be from 2 to 8, and group_size={group_size} positive.")
    chosen = dict(quantizable(model))
    for name, param in chosen.items():
        if not param.is_floating_point():
            raise ValueError(f"{name!r} holds {param.dtype}: the model is quantized already.")
    for name, param in chosen.items():
        matrix = _by_output(model.get_submodule(name.rpartition(".")[0]), param)
        matrix.copy_(_rounded(matrix, bits, group_size))


def _held(module: torch.nn.Module, name: str, bits: int, group_size: int = GROUP_SIZE) -> Held | str:
    matrix = _by_output(module, getattr(module, name))
    rows = matrix.detach().reshape(-1, matrix.shape[-1])
    most = max(_most_values(piece) for piece in rows.split(group_size, dim=-1))
    if most > 2**bits:
        return f"holds {most} values a group"
    if rows.dtype in (torch.float32, torch.float64) and not _on_grid(rows, bits, group_size):
        return f"holds values that {bits} bits cannot"
    groups = matrix.numel() // matrix.shape[-1] * -(-matrix.shape[-1] // group_size)
    return Held("rounded", -(-(matrix.numel() * bits + groups * (16 + bits)) // 8))


def _most_values(groups: torch.Tensor) -> int:
    """The largest number of different values in a row."""
    ordered = groups.sort(dim=-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def _on_grid(rows: torch.Tensor, bits: int, group_size: int) -> bool:
    """Whether the values of each group are whole multiples of one step, with at most 2**bits steps between them.

    The rounded zero point may leave one of the steps unused. Values of 16 bits are too coarse to tell.
    """
    for piece in rows.split(group_size, dim=-1):
        span = piece.amax(-1, keepdim=True).clamp(min=0) - piece.amin(-1, keepdim=True).clamp(max=0)
        good = torch.zeros(len(piece), dtype=torch.bool, device=piece.device)
        for steps in (2**bits - 1, 2**bits - 2):
            codes = piece * steps / span.clamp(min=1e-30)
            good |= ((codes - codes.round()).abs() < 0.01).all(-1)
        if not good.all():
            return False
    return True


def _by_output(module: torch.nn.Module, param: torch.Tensor) -> torch.Tensor:
    """A view of a weight whose last dimension is that of the inputs."""
    return param.transpose(0, 1) if isinstance(module, Conv1D) else param


def _rounded(matrix: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    columns = []
    top = 2**bits - 1
    for piece in matrix.float().split(group_size, dim=-1):
        low, high = piece.amin(-1, keepdim=True).clamp(max=0), piece.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-30)
        zero = (-low / scale).round()
        columns.append((((piece / scale).round() + zero).clamp(0, top) - zero) * scale)
    return torch.cat(columns, dim=-1)


for _bits in (8, 6, 5, 4, 3, 2):
    register(
        Quantizer(
            scheme=f"rtn{_bits}",
            help=f"rounding to nearest, {_bits} bits in groups of {GROUP_SIZE}",
            held=functools.partial(_held, bits=_bits),
            apply=torch.no_grad()(functools.partial(_round, bits=_bits)),
            simulated=True,
        )
    )
