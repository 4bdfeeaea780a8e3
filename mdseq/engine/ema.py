"""The exponential moving average of the weights, sharded like the optimiser's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdseq.engine.weights import master_partitions

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


class WeightAverage:
    """Averages this rank's share of the fp32 weights, so that no rank holds a full copy.

    average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + step) / (10 + step)): a ramp, so
    that a short run does not average its random start.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        self._weights = master_partitions(engine)
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [weight.detach() for weight in self._weights], 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside the block the optimiser's weights are the average: what is gathered is the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for mine, saved in zip(self._average, state["average"], strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            held = weight.detach().clone()
            weight.data.copy_(average)
            average.copy_(held)
