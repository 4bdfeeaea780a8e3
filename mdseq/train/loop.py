"""The training loop: steps and nothing else; what happens around a step is the hooks' business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mdseq.data.batch import Batch
from mdseq.data.loader import Loader
from mdseq.diffusion.balance import RouterBalance
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.timesteps import TimestepSampler
from mdseq.engine.agreement import Agreement
from mdseq.engine.ema import WeightAverage
from mdseq.engine.gradients import check_gradient_norm, step_was_skipped
from mdseq.engine.partitions import Partition
from mdseq.engine.waiting import StepClock
from mdseq.report.spread import Spread
from mdseq.spec import GuardSpec, RunSpec
from mdseq.train.guard import Guard
from mdseq.train.schedule import learning_rate
from mdseq.train.signals import StopSignals
from mdseq.train.watch import Hear, Limit, Watch

if TYPE_CHECKING:
    from mdseq.engine.build import DeepSpeedEngine


def start_limit(guard: GuardSpec, what: str) -> Limit:
    """Of what comes before the second step."""
    seconds = guard.start_seconds
    return Limit(seconds, f"{what} for {seconds:g} s; if nothing hangs, raise guard.start_seconds")


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
        partitions: What this rank's optimiser updates.
        agreement: Between all ranks.
        step: Optimiser steps taken.
        tokens: Real tokens seen, over all ranks.
        learning_rate: Of the last step.
        valid_loss: Of held-out rows after the last step, if it was computed.
        spread: Of the ranks' own times in the last step, if it was measured.
        guard: Over steps that are better not taken.
        stopped_by: The signal that has ended training early; 0 for none. The same on every rank.
        clock: Measures every step that is reported, if there are ranks to compare.
    """

    spec: RunSpec
    engine: DeepSpeedEngine
    loader: Loader
    partitions: Sequence[Partition]
    average: WeightAverage
    agreement: Agreement
    device: torch.device
    step: int = 0
    tokens: int = 0
    learning_rate: float = 0.0
    valid_loss: float | None = None
    spread: Spread | None = None
    stopped_by: int = 0
    guard: Guard = field(init=False)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.spec.guard)
        self.clock = StepClock(self.device, self.spec.report.log_interval_steps if self.agreement.num_ranks > 1 else 0)
        self._losses: list[Tensor] = []  # of this step's micro-batches, until they are looked at
        check_gradient_norm(self.engine, self._allows)

    @property
    def objective(self) -> DiffusionObjective:
        return self.engine.module

    def run(self, hooks: Sequence[Hook], hear: Hear | None = None) -> None:
        """Train to the schedule's last step, or until a signal asks any rank to stop.

        Args:
            hooks: Called after each step, in this order.
            hear: Called with the heartbeats of all ranks; see `Watch`.
        """
        self.objective.train()
        seconds = self.spec.guard.hang_seconds
        limit = Limit(seconds, f"no step for {seconds:g} s; if nothing hangs, raise guard.hang_seconds")
        first = start_limit(self.spec.guard, "no first step")
        try:
            with StopSignals() as signals, Watch(lambda: self.step, limit, first, hear):
                while not self.is_last_step:
                    with self.clock.step(self.step + 1):
                        self._take_step()
                        self.stopped_by = self.agreement.highest([signals.received])[0]
                    for hook in hooks:
                        hook.after_step(self)
        finally:
            for hook in hooks:
                hook.close()
            self.loader.close()

    @property
    def is_last_step(self) -> bool:
        """Whether the step just taken is the last."""
        return self.step >= self.spec.schedule.steps or bool(self.stopped_by)

    def _take_step(self) -> None:
        self.learning_rate = learning_rate(self.step, self.spec.optimiser, self.spec.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.valid_loss = self.spread = None
        reported = self.objective.statistics.tally.clone()
        with self.clock.data():
            micro_batches = self.loader.micro_batches(self.step)
        self._losses = []
        for batch in micro_batches:
            loss = self.engine(batch.to(self.device))
            self._losses.append(loss.detach())
            self.engine.backward(loss)
            self.engine.step()
        if step_was_skipped(self.engine):
            self._forget_step(micro_batches, reported)
        else:
            self._agree_on_tallies()
            self.average.update(self.step)
            self.guard.end_step(taken=True)
        self.step += 1
        self.tokens += micro_batches[0].totals.tokens

    def _allows(self, gradient_norm: float) -> bool:
        """Whether a step may be taken: asked once its gradient is known, so that the host waits for a GPU only once."""
        loss = self.agreement.mean(float(torch.stack(self._losses).mean()))
        return self.guard.allows("loss", loss) and self.guard.allows("gradient norm", gradient_norm)

    def _forget_step(self, micro_batches: Sequence[Batch], reported: Tensor) -> None:
        """Leave no trace of a step that was not taken, but for a message; `reported` are the statistics before it."""
        rows = self.agreement.gather([row for batch in micro_batches for row in batch.row_b.tolist()])
        if self.agreement.rank == 0:
            ids = sorted(row for of_rank in rows for row in of_rank)
            listed = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
            print(f"step {self.step + 1} skipped: {self.guard.reason}; its rows are {listed}", flush=True)
        for part in self._tallied():
            part.tally.zero_()
        self.objective.statistics.tally.copy_(reported)
        self.guard.end_step(taken=False)

    def _tallied(self) -> list[TimestepSampler | RouterBalance]:
        balance = self.objective.balance
        return [self.objective.timesteps, *([balance] if balance is not None else [])]

    def _agree_on_tallies(self) -> None:
        """Sum over ranks what the next step's timesteps and router losses depend on, in one collective."""
        parts = self._tallied()
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
            "optimiser_steps": int(self.partitions[0].state.get("step", 0)),
            "timesteps": self.objective.timesteps.state_dict(),
            "balance": balance.state_dict() if balance is not None else {},
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.guard.load_state_dict(state["guard"])
        self.objective.timesteps.load_state_dict(state["timesteps"])
        if self.objective.balance is not None:
            self.objective.balance.load_state_dict(state["balance"])
