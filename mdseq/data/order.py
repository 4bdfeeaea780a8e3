"""Which rows make a step: a shuffle that is a function of (seed, epoch), not a stored list.

Sample g of training (g = step * batch_size + index in the batch) is row P_epoch(g mod num_rows) of epoch g //
num_rows. To shuffle well and still read a dataset larger than memory from one place for a while, P has two parts:

1. the rows are cut into blocks of neighbours, and the blocks are permuted over the whole corpus;
2. every `window` of rows of that sequence, many blocks, is permuted as a whole.

Both use a Feistel network over the smallest power of four that holds the range, walked along its cycle until it lands
in the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So any step is found in O(batch_size),
whatever came before it and however many ranks there are.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

NUM_ROUNDS = 6
BLOCKS_PER_WINDOW = 64


class Order(Protocol):
    """Which rows each step takes."""

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row indices of the global batch of `step`: int64 [batch_size]."""


class RowOrder:
    """Every epoch visits every row once. Without `shuffle`, rows come in sequence.

    With at most `window` rows, an epoch is one permutation of all of them. With more, each `window` of samples comes
    from about BLOCKS_PER_WINDOW places of the corpus.
    """

    def __init__(self, num_rows: int, seed: int, window: int = 2**16, shuffle: bool = True) -> None:
        assert num_rows > 0
        assert window > 0
        self.num_rows = num_rows
        self.seed = seed
        self.window = window
        self.block = max(1, window // BLOCKS_PER_WINDOW)
        self.shuffle = shuffle
        self._key = seed_key(seed)

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row indices of the global batch of `step`: int64 [batch_size]."""
        return self.rows_of(samples_of(step, batch_size))

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Row of each sample, counted from the start of training: int64, the same shape."""
        epochs, indices = np.divmod(samples, self.num_rows)
        if not self.shuffle:
            return indices
        keys = mix(self._key ^ epochs.astype(np.uint64))
        if self.num_rows <= self.window:
            return permuted(indices, np.full_like(indices, self.num_rows), keys)
        return self._of_blocks(self._within_windows(indices, keys), keys)

    def _within_windows(self, indices: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Permute each stretch of `window` indices; the last one may be shorter."""
        windows, places = np.divmod(indices, self.window)
        sizes = np.minimum(self.window, self.num_rows - windows * self.window)
        return windows * self.window + permuted(places, sizes, mix(keys ^ mix(windows.astype(np.uint64))))

    def _of_blocks(self, indices: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Row at each index of the sequence of permuted blocks.

        The last block may be shorter. It gets a slot of its own in every epoch, and the others are permuted around it.
        """
        keys = mix(keys + np.uint64(NUM_ROUNDS))
        num_whole, rest = divmod(self.num_rows, self.block)
        rest_begin = (keys % np.uint64(num_whole + 1)).astype(np.int64) * self.block
        in_rest = (indices >= rest_begin) & (indices < rest_begin + rest)
        among_whole = np.where(indices < rest_begin, indices, indices - rest)
        slots, places = np.divmod(np.where(in_rest, 0, among_whole), self.block)
        blocks = permuted(slots, np.full_like(slots, num_whole), keys)
        return np.where(in_rest, num_whole * self.block + indices - rest_begin, blocks * self.block + places)


def samples_of(step: int, batch_size: int) -> np.ndarray:
    """Numbers of the samples of a step, counted from the start of training: int64 [batch_size]."""
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)


def permuted(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations of 0..sizes-1 take `indices`, elementwise; int64, `keys` uint64."""
    half_bits = _half_bits(sizes)
    round_keys_rn = mix(keys + np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None])
    values, limits = indices.astype(np.uint64), sizes.astype(np.uint64)
    outside = np.arange(len(indices))
    while len(outside):
        values[outside] = _feistel(values[outside], round_keys_rn[:, outside], half_bits[outside])
        outside = outside[values[outside] >= limits[outside]]
    return values.astype(np.int64)


def _half_bits(sizes: np.ndarray) -> np.ndarray:
    """Half the bits of the smallest power of four that holds each size, at least 1; uint64."""
    different, index = np.unique(sizes, return_inverse=True)
    half_bits = [max(1, (size - 1).bit_length() + 1 >> 1) for size in different.tolist()]
    return np.array(half_bits, dtype=np.uint64)[index]


def _feistel(values: np.ndarray, round_keys_rn: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """Keyed permutations of 0..4**half_bits - 1, elementwise; a key for each round and value, all uint64."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_keys in round_keys_rn:
        left, right = right, left ^ (mix(right ^ round_keys) & mask)
    return left << half_bits | right


def seed_key(seed: int) -> np.ndarray:
    """Key of a seed, any integer: uint64 [1]."""
    return mix(np.array([seed % 2**64], dtype=np.uint64))


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's step (Steele, Lea and Flood, 2014): a bijection that spreads every bit of uint64."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
