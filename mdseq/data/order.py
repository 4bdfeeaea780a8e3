"""Which rows make a step: a shuffle that is a function of (seed, epoch), not a stored list.

Sample g of training (g = step * batch_size + index in the batch) is row P_epoch(g mod num_rows) of epoch g //
num_rows. P is a Feistel network over the smallest power of four that holds the rows, walked along its cycle
until it lands on a row (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): any step is found
in O(batch_size), whatever the number of ranks.
"""

from __future__ import annotations

import numpy as np

NUM_ROUNDS = 6


class RowOrder:
    """Rows of each step; every epoch visits every row once. Without `shuffle`, rows come in sequence."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        assert num_rows > 0
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row indices of the global batch of `step`: int64 [batch_size]."""
        samples = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        epochs, indices = np.divmod(samples, self.num_rows)
        return self._permuted(epochs, indices) if self.shuffle else indices

    def _permuted(self, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        half_bits = max(1, (self.num_rows - 1).bit_length() + 1 >> 1)
        keys = _mix(_mix(np.uint64(self.seed % 2**64)) ^ epochs.astype(np.uint64))
        rows = _feistel(indices.astype(np.uint64), keys, half_bits)
        while np.any(outside := rows >= self.num_rows):
            rows[outside] = _feistel(rows[outside], keys[outside], half_bits)
        return rows.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A keyed permutation of 0..4**half_bits - 1, elementwise; uint64 in and out."""
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for round_index in range(NUM_ROUNDS):
        round_keys = _mix(keys + np.uint64(round_index))
        left, right = right, left ^ (_mix(right ^ round_keys) & mask)
    return left << np.uint64(half_bits) | right


def _mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """The splitmix64 generator's step (Steele, Lea and Flood, 2014): a bijection that spreads every bit."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
