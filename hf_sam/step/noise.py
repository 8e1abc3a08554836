"""Random numbers that depend on the position in a parameter, not on how it is sharded over ranks."""

import torch

from ..runtime.fingerprint import seed_of

# Sizes of the blocks in which random numbers are drawn. A shard draws all blocks that it touches, so blocks are small
# where small parameters end, and large where many would cost an accelerator too many kernels.
_SMALLEST, _LARGEST = 1 << 14, 1 << 22
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
    position, end = first, first + count
    while position < end:
        block, size = _block(position)
        generator.manual_seed(seed_of(f"{key} {block}"))
        bits = torch.empty(size // 4, dtype=torch.int64, device=device)
        bits.random_(-(2**63), None, generator=generator)
        upto = min(end, block + size)
        result[position - first : upto - first] = bits.view(torch.int16)[position - block : upto - block]
        position = upto
    return result.add_(0.5).mul_(12**0.5 / _LEVELS)


def _block(position: int) -> tuple[int, int]:
    """First position and size of the block with this position: two blocks from each power of two to the next."""
    if position < _SMALLEST:
        return 0, _SMALLEST
    size = min(1 << (position.bit_length() - 2), _LARGEST)
    return position // size * size, size
