"""The exponential moving average of the weights, sharded like the optimiser's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdseq.engine.partitions import Partition


class WeightAverage:
    """Averages this rank's share of the fp32 weights, so that no rank holds a full copy.

    average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + step) / (10 + step)): a ramp, so
    that a short run does not average its random start.

    Attributes:
        values: The average of each partition, flat.
    """

    def __init__(self, partitions: Sequence[Partition], decay: float) -> None:
        self.decay = decay
        self.values: list[Tensor] = [partition.weights.clone() for partition in partitions]
        self._weights = [partition.weights for partition in partitions]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self._weights, 1 - decay)
