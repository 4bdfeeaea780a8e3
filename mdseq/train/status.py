"""Writes how the run is doing, from what its ranks tell of themselves."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mdseq.errors import UserError
from mdseq.report.spread import Spread
from mdseq.report.status import WRITTEN_EVERY_SECONDS, RankStatus, RunStatus, State
from mdseq.train.loop import Trainer
from mdseq.train.watch import Heartbeat


class StatusHook:
    """Keeps `status.json` of the run folder true; for rank 0 alone.

    Args:
        run: The run folder.
        step, steps: Taken before this start, and of the schedule.
        num_ranks: All of them.
        clock: Seconds since 1970.
    """

    def __init__(
        self, run: Path, step: int, steps: int, num_ranks: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._run = run
        self._clock = clock
        self._started = self._written = clock()
        self._step, self._steps = step, steps
        self._first: tuple[int, float] | None = None  # the first step of this start, and when it was taken
        self._spread: Spread | None = None
        self._state: State = "failed"  # unless it is known to end well
        self._heard = [(Heartbeat(0, step, "", False, ""), self._started) for _ in range(num_ranks)]
        self._starts = 1
        with suppress(UserError):
            before = RunStatus.read(run)
            self._starts += before.starts if before else 0
        self._write("running")

    def hear(self, beats: Sequence[Heartbeat | None]) -> None:
        """The newest heartbeats of all ranks; called every few seconds, by another thread."""
        now = self._clock()
        for rank, beat in enumerate(beats):
            if beat is not None and beat.count != self._heard[rank][0].count:
                self._heard[rank] = (beat, now)
        if now - self._written >= WRITTEN_EVERY_SECONDS:
            self._write("running")

    def after_step(self, trainer: Trainer) -> None:
        self._step = trainer.step
        self._spread = trainer.spread or self._spread
        self._first = self._first or (trainer.step, self._clock())
        if trainer.is_last_step:
            self._state = "stopped" if trainer.stopped_by else "finished"

    def close(self) -> None:
        self._write(self._state)

    def _write(self, state: State) -> None:
        now = self._written = self._clock()
        taken, seconds = (self._step - self._first[0], now - self._first[1]) if self._first else (0, 0.0)
        status = RunStatus(
            state=state,
            written=now,
            started=self._started,
            starts=self._starts,
            host=platform.node(),
            process=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            step=self._step,
            steps=self._steps,
            steps_per_second=taken / seconds if taken and seconds else 0.0,
            ranks=tuple(
                RankStatus(rank, beat.host, beat.step, now - heard) for rank, (beat, heard) in enumerate(self._heard)
            ),
            spread=self._spread,
        )
        with suppress(OSError):  # no room on the disk: what matters will say so
            status.write(self._run)
