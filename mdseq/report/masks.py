"""A mask too large to look at, as a picture: the share of visible pairs in each of its cells.

In time linear in the slots, for it is summed along the diagonals that a window opens.

Shapes: s slots, g global slots, m documents, c cells on a side.
"""

from __future__ import annotations

import numpy as np

from mdseq.sparse import NO_DOCUMENT, Pattern

# Diagonals that are counted at a time: enough to keep numpy busy, few enough to stay in the cache.
_CHUNK = 16


def cells_of(num_slots: int, num_global: int, most: int) -> np.ndarray:
    """The cell of each slot: global slots and tokens apart, at most `most` cells of each, but for the last as large."""
    num_tokens = num_slots - num_global
    global_g = np.arange(num_global) // -(-num_global // most or 1)
    tokens = np.arange(num_tokens) // -(-num_tokens // most or 1)
    return np.concatenate([global_g, tokens + (global_g[-1] + 1 if num_global else 0)])


def pooled_mask(
    pattern: Pattern, dilation: int, document_s: np.ndarray, num_global: int, cell_s: np.ndarray
) -> np.ndarray:
    """Share of the pairs of each cell that the heads of one dilation see: [c, c], queries down, keys across.

    Args:
        pattern, dilation: What is to be drawn.
        document_s: Document of each slot, NO_DOCUMENT where there is none; global slots first.
        num_global: How many they are (g).
        cell_s: Cell that each slot falls into, ascending from 0.
    """
    num_cells = int(cell_s[-1]) + 1
    count_mc = np.zeros((2, int(document_s.max(initial=0)) + 1, num_cells))
    is_token_s = np.arange(len(document_s)) >= num_global
    real_s = document_s != NO_DOCUMENT
    np.add.at(count_mc, (is_token_s[real_s].astype(int), document_s[real_s], cell_s[real_s]), 1)
    globals_mc, tokens_mc = count_mc
    if pattern.window is None:
        visible_cc = (globals_mc + tokens_mc).T @ (globals_mc + tokens_mc)
    else:
        visible_cc = globals_mc.T @ (globals_mc + tokens_mc) + tokens_mc.T @ globals_mc
        visible_cc += _window_pairs(document_s[num_global:], cell_s[num_global:], num_cells, pattern.window, dilation)
    size_c = np.bincount(cell_s, minlength=num_cells)
    return visible_cc / np.outer(size_c, size_c)


def _window_pairs(document_s: np.ndarray, cell_s: np.ndarray, num_cells: int, window: int, dilation: int) -> np.ndarray:
    """Pairs of tokens, diagonal by diagonal."""
    length = len(document_s)
    real_s = document_s != NO_DOCUMENT
    visible = np.zeros(num_cells**2, dtype=np.int64)
    distances = range(dilation, min(window * dilation, length - 1) + 1, dilation)
    for first in range(0, len(distances), _CHUNK):
        pairs = []
        for distance in distances[first : first + _CHUNK]:
            query, key = cell_s[distance:], cell_s[:-distance]
            same = real_s[distance:] & (document_s[distance:] == document_s[:-distance])
            pairs.append((query * num_cells + key)[same])
        visible += np.bincount(np.concatenate(pairs), minlength=num_cells**2)
    below_cc = visible.reshape(num_cells, num_cells)
    itself_c = np.bincount(cell_s[real_s], minlength=num_cells)
    return below_cc + below_cc.T + np.diag(itself_c)
