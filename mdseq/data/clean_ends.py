"""A source for texts that have none: ends that are kept clean, so that the model learns to continue and to fill."""

from __future__ import annotations

import numpy as np
import torch

from mdseq.data.packing import Pieces
from mdseq.noise import NoiseKey, Purpose
from mdseq.spec import RunSpec


class CleanEnds:
    """Keeps a prefix of half of the pieces clean, and a suffix of another half, of a share uniform in (0, its most].

    DiffuSeq-v2 pretrains on texts with a prefix, of every piece and up to half of it; the pieces that have none, here,
    keep the model able to write from nothing, and those with both ends are gaps to fill. Drawn by (seed, step, row,
    piece), like all noise.
    """

    def __init__(self, seed: int, max_prefix: float, max_suffix: float = 0.0) -> None:
        self.seed = seed
        self.max_prefix = max_prefix
        self.max_suffix = max_suffix

    @classmethod
    def of(cls, spec: RunSpec) -> CleanEnds:
        return cls(spec.seed, spec.data.max_prefix, spec.data.max_suffix)

    def shares(self, step: int, rows: np.ndarray, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """Share of each piece of `rows` that stays clean at its beginning and at its end, float32 [len(pieces)]."""
        place = np.arange(len(pieces)) - np.searchsorted(pieces.row, pieces.row)  # within its row
        key = NoiseKey(self.seed, step, torch.from_numpy(rows))

        def of_half(purpose: Purpose, most: float) -> np.ndarray:
            uniform = key.uniform(purpose, int(place.max()) + 1).numpy()[pieces.row, place]
            return np.maximum(2.0 * uniform - 1.0, 0.0) * most

        return of_half(Purpose.PREFIX, self.max_prefix), of_half(Purpose.SUFFIX, self.max_suffix)
