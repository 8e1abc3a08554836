"""Rows of text that repeat a short pattern, as broken web pages and logs do. They can make the loss spike."""

import numpy as np

# As in the training of OLMo-2 (arXiv 2501.00656): this many repetitions of 1 to 13 tokens.
MAX_PERIOD = 13
REPETITIONS = 32


def is_repetitive(tokens: np.ndarray) -> bool:
    """Whether a pattern of up to `MAX_PERIOD` tokens stands `REPETITIONS` times in a row.

    Args:
        tokens (`np.ndarray` of shape `(n,)`): tokens of a row.
    """
    for period in range(1, MAX_PERIOD + 1):
        repeated = (REPETITIONS - 1) * period
        if repeated + period > len(tokens):
            return False
        changes = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate([[-1], changes, [len(tokens) - period]])
        if (np.diff(edges) > repeated).any():
            return True
    return False
