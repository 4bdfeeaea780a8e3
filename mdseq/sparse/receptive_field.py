"""How far a token sees through several layers, exactly and in linear time.

Shapes: n tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mdseq.sparse.pattern import Pattern


def reachable(patterns: Sequence[Pattern], length: int, position: int) -> list[np.ndarray]:
    """Tokens that bear on the token at `position` after each of the layers, through their windows alone: bool [n].

    A message that the last layer hands over has come through the layers before it, so the set after layer k is found
    by going from the token through layers k, k - 1, ... 1. No path leaves the document. (Through a global slot, two
    layers reach everything: it reads the document in the one, and is read in the other.)

    Args:
        patterns: Of the layers, in order.
        length: Ordinary tokens of the document (n).
        position: The token, counted among them.
    """
    return [_collect(patterns[: depth + 1], length, position) for depth in range(len(patterns))]


def _collect(patterns: Sequence[Pattern], length: int, position: int) -> np.ndarray:
    seen_n = np.zeros(length, dtype=bool)
    seen_n[position] = True
    for pattern in reversed(patterns):
        if pattern.window is None:
            return np.ones(length, dtype=bool)
        seen_n = np.logical_or.reduce([_spread(seen_n, pattern.window, d) for d in set(pattern.dilations)])
    return seen_n


def _spread(seen_n: np.ndarray, window: int, dilation: int) -> np.ndarray:
    """Tokens within `window` steps of `dilation` of a seen one: a running sum over every residue class."""
    length = len(seen_n)
    steps = -(-length // dilation)
    seen_jr = np.zeros((steps, dilation), dtype=np.int64)
    seen_jr.reshape(-1)[:length] = seen_n
    before_jr = np.concatenate([np.zeros((1, dilation), dtype=np.int64), seen_jr.cumsum(axis=0)])
    step_j = np.arange(steps)
    until_jr = before_jr[np.minimum(step_j + window + 1, steps)]
    return (until_jr > before_jr[np.maximum(step_j - window, 0)]).reshape(-1)[:length]
