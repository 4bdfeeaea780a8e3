"""A source for texts that have none: a prefix kept clean, so that a model of texts learns to continue."""

from __future__ import annotations

import numpy as np
import torch

from mdseq.data.packing import Pieces
from mdseq.noise import NoiseKey, Purpose


class CleanPrefix:
    """Keeps a prefix of half of the pieces clean, its share of the piece uniform in (0, max_share].

    DiffuSeq-v2 pretrains on texts this way, with every piece and max_share = 0.5; the other half, here, keeps the
    model able to write from nothing. Drawn by (seed, step, row, piece), like all noise.
    """

    def __init__(self, seed: int, max_share: float) -> None:
        self.seed = seed
        self.max_share = max_share

    def shares(self, step: int, rows: np.ndarray, pieces: Pieces) -> np.ndarray:
        """Share of each piece of `rows` that stays clean, float32 [len(pieces)]."""
        place = np.arange(len(pieces)) - np.searchsorted(pieces.row, pieces.row)  # within its row
        key = NoiseKey(self.seed, step, torch.from_numpy(rows))
        uniform = key.uniform(Purpose.PREFIX, int(place.max()) + 1).numpy()[pieces.row, place]
        return np.maximum(2.0 * uniform - 1.0, 0.0) * self.max_share
