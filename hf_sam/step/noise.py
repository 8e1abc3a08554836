"""Random numbers that depend on the position in a parameter, not on how it is sharded over ranks."""

import torch

from ..runtime.fingerprint import seed_of

# Random numbers are drawn in blocks of this many elements; a shard draws the blocks that it touches.
_BLOCK = 1 << 16


def uniform_noise(key: str, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Independent numbers with mean 0 and variance 1, uniform in (-sqrt(3), sqrt(3)).

    Args:
        key (`str`): seed, step and name of the parameter.
        first (`int`): position of the first number in the flat parameter.
        count (`int`): how many numbers.
        device (`torch.device`): where they are drawn.

    Returns:
        `torch.Tensor`: fp32, shape `(count,)`.
    """
    generator = torch.Generator(device=device)
    blocks = []
    for block in range(first // _BLOCK, -(-(first + count) // _BLOCK)):
        generator.manual_seed(seed_of(f"{key} {block}"))
        blocks.append(torch.rand(_BLOCK, generator=generator, device=device))
    start = first % _BLOCK
    drawn = torch.cat(blocks)[start : start + count] if len(blocks) > 1 else blocks[0][start : start + count]
    return drawn.sub_(0.5).mul_(12**0.5)
