"""The training loop: steps and nothing else; what happens around a step is the hooks' business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from mdseq.data.loader import Loader
from mdseq.diffusion.balance import RouterBalance
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.timesteps import TimestepSampler
from mdseq.engine.ema import WeightAverage
from mdseq.spec import RunSpec
from mdseq.train.schedule import learning_rate

if TYPE_CHECKING:
    from mdseq.engine.build import DeepSpeedEngine


class Hook(Protocol):
    """Something that happens around steps. All ranks call all hooks in the same order, so hooks may communicate."""

    def after_step(self, trainer: Trainer) -> None:
        """Called when `trainer.step` steps have been taken."""

    def close(self) -> None:
        """Called once, however training ends."""


@dataclass
class Trainer:
    """Everything a step needs, and how far the run has come.

    Attributes:
        step: Optimiser steps taken.
        tokens: Real tokens seen, over all ranks.
        learning_rate: Of the last step.
    """

    spec: RunSpec
    engine: DeepSpeedEngine
    loader: Loader
    average: WeightAverage
    device: torch.device
    step: int = 0
    tokens: int = 0
    learning_rate: float = 0.0

    @property
    def objective(self) -> DiffusionObjective:
        return self.engine.module

    def run(self, hooks: Sequence[Hook]) -> None:
        """Train to the schedule's last step."""
        self.objective.train()
        try:
            while self.step < self.spec.schedule.steps:
                self._take_step()
                for hook in hooks:
                    hook.after_step(self)
        finally:
            for hook in hooks:
                hook.close()
            self.loader.close()

    def _take_step(self) -> None:
        self.learning_rate = learning_rate(self.step, self.spec.optimiser, self.spec.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate
        micro_batches = self.loader.micro_batches(self.step)
        for batch in micro_batches:
            loss = self.engine(batch.to(self.device))
            self.engine.backward(loss)
            self.engine.step()
        self._agree_on_tallies()
        self.average.update(self.step)
        self.step += 1
        self.tokens += micro_batches[0].totals.tokens

    def _agree_on_tallies(self) -> None:
        """Sum over ranks what the next step's timesteps and router losses depend on, in one collective."""
        parts: list[TimestepSampler | RouterBalance] = [self.objective.timesteps]
        if self.objective.balance is not None:
            parts.append(self.objective.balance)
        summed = torch.cat([part.tally.flatten() for part in parts])
        dist.all_reduce(summed)
        for part, values in zip(parts, summed.split([part.tally.numel() for part in parts]), strict=True):
            part.tally.copy_(values.view_as(part.tally))
            part.end_step()

    def state_dict(self) -> dict[str, Any]:
        """State that is the same on every rank and that the engine does not hold."""
        balance = self.objective.balance
        return {
            "step": self.step,
            "tokens": self.tokens,
            "timesteps": self.objective.timesteps.state_dict(),
            "balance": balance.state_dict() if balance is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.objective.timesteps.load_state_dict(state["timesteps"])
        if self.objective.balance is not None:
            self.objective.balance.load_state_dict(state["balance"])
