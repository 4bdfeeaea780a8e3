"""What the objective reports of itself, summed on the device so that no step waits for the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NUM_NOISE_LEVELS = 10
PARTS = ("loss", "denoising", "anchor", "rounding", "balance", "router_z")


class LossStatistics:
    """Sums since the last report.

    Attributes:
        tally: fp32, the sums of PARTS, the number of micro-batches, then for each of NUM_NOISE_LEVELS equal
            intervals of t the sum of document losses and the number of documents. Summing it over ranks gives the
            statistics of the global batch.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.tally = torch.zeros(len(PARTS) + 1 + 2 * NUM_NOISE_LEVELS, device=device)

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add one micro-batch; each value's mean over all micro-batches is the value of the global batch."""
        self.tally[0] += loss.detach()
        for name, value in parts.items():
            self.tally[PARTS.index(name)] += value.detach()
        self.tally[len(PARTS)] += 1

    def add_documents(self, timestep_bm: Tensor, loss_bm: Tensor, counted_bm: Tensor) -> None:
        """Add the mean loss of each document that counts."""
        level = (timestep_bm.flatten() * NUM_NOISE_LEVELS / self.num_timesteps).long()
        sums, counts = self.tally[len(PARTS) + 1 :].view(2, NUM_NOISE_LEVELS)
        sums.index_add_(0, level, (loss_bm * counted_bm).flatten())
        counts.index_add_(0, level, counted_bm.flatten().float())

    def take(self) -> dict[str, float]:
        """Means of the tally, by now the sum over all ranks: each part, and "noise_level_i" where it was met.

        Nothing, if nothing was added.
        """
        values = self.tally.tolist()
        self.tally.zero_()
        micro_batches = values[len(PARTS)]
        if not micro_batches:
            return {}
        means = {name: values[i] / micro_batches for i, name in enumerate(PARTS)}
        sums, counts = values[len(PARTS) + 1 : -NUM_NOISE_LEVELS], values[-NUM_NOISE_LEVELS:]
        levels = {f"noise_level_{i}": sums[i] / counts[i] for i in range(NUM_NOISE_LEVELS) if counts[i]}
        return means | levels
