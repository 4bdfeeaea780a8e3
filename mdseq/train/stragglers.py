"""Finds out which rank the others wait for."""

from __future__ import annotations

import platform

from mdseq.report.spread import Pace, Spread
from mdseq.train.loop import Trainer

SLOW_FACTOR = 1.3
# One slow step proves nothing: a page fault, a neighbour's job, the garbage collector.
REPORTS_IN_A_ROW = 2


class Stragglers:
    """Which spreads are worth telling of."""

    def __init__(self) -> None:
        self._rank: int | None = None  # slow in the last report
        self._reports = 0  # in a row, of that rank

    def is_news(self, spread: Spread) -> bool:
        """Whether a rank is slow in the second report in a row; not again until it is another's turn, or nobody's."""
        rank = spread.slowest_rank if spread.factor > SLOW_FACTOR else None
        self._reports = self._reports + 1 if rank == self._rank else 1
        self._rank = rank
        return rank is not None and self._reports == REPORTS_IN_A_ROW


class StragglerHook:
    """After each step that was measured, gathers all ranks' times; before the other hooks, which note them."""

    def __init__(self) -> None:
        self._stragglers = Stragglers()

    def after_step(self, trainer: Trainer) -> None:
        seconds = trainer.clock.take()
        if seconds is None:
            return
        pace = Pace(platform.node(), seconds.own, seconds.data, seconds.step)
        trainer.spread = Spread.of(trainer.agreement.gather(pace))
        if self._stragglers.is_news(trainer.spread) and trainer.agreement.rank == 0:
            print(f"step {trainer.step}: {trainer.spread}", flush=True)

    def close(self) -> None:
        """Nothing to release."""
