"""Random numbers that depend on the position in a parameter, not on how it is sharded over ranks."""

import torch

from ..runtime.fingerprint import seed_of

# Random numbers are drawn in blocks of this many elements; a shard draws the blocks that it touches.
_BLOCK = 1 << 16
# Four numbers of 16 bits from each draw of 64 bits: half the time of one draw each.
_LEVELS = 1 << 16


def uniform_noise(key: str, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Independent numbers with mean 0 and variance 1, uniform in (-sqrt(3), sqrt(3)).

    Args:
        key (`str`): what determines the numbers: seed, step and name of the parameter.
        first (`int`): position of the first number in the flat parameter.
        count (`int`): how many numbers.
        device (`torch.device`): where they are drawn. CPUs and accelerators draw different numbers.

    Returns:
        `torch.Tensor`: fp32, shape `(count,)`.
    """
    generator = torch.Generator(device=device)
    result = torch.empty(count, dtype=torch.float32, device=device)
    for block in range(first // _BLOCK, -(-(first + count) // _BLOCK)):
        generator.manual_seed(seed_of(f"{key} {block}"))
        bits = torch.empty(_BLOCK // 4, dtype=torch.int64, device=device)
        bits.random_(-(2**63), None, generator=generator)
        start, end = max(first, block * _BLOCK), min(first + count, (block + 1) * _BLOCK)
        result[start - first : end - first] = bits.view(torch.int16)[start - block * _BLOCK : end - block * _BLOCK]
    return result.add_(0.5).mul_(12**0.5 / _LEVELS)
