"""How a run is doing, in a file that whoever sees its folder can read: `status.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mdseq.errors import UserError
from mdseq.files import write_whole
from mdseq.report.spread import Spread

STATUS_FILE = "status.json"
WRITTEN_EVERY_SECONDS = 10.0
# Three writings missed, or a rank's heartbeat: something is wrong.
SILENT_SECONDS = 3 * WRITTEN_EVERY_SECONDS

# "running" until the process says otherwise; one that is killed never does.
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class RankStatus:
    """One rank.

    Attributes:
        rank: Of all.
        host: Its node's name; empty before it was heard for the first time.
        step: Steps that it has taken.
        silent_seconds: For how long it had not been heard when the status was written.
    """

    rank: int
    host: str
    step: int
    silent_seconds: float


@dataclass(frozen=True)
class RunStatus:
    """A run, as its rank 0 sees it.

    Attributes:
        state: See State.
        written: When, in seconds since 1970.
        started: When its processes were, likewise.
        starts: How often they have been.
        host, process: Of rank 0.
        job: Slurm's number for it; empty elsewhere.
        step, steps: Optimiser steps taken, and those of the schedule.
        steps_per_second: Since the first step of this start; 0 before there are two.
        ranks: All of them.
        spread: Of their own times in the last step that was measured; None before one was, or of one rank.
    """

    state: State
    written: float
    started: float
    starts: int
    host: str
    process: int
    job: str
    step: int
    steps: int
    steps_per_second: float
    ranks: tuple[RankStatus, ...]
    spread: Spread | None = None

    @classmethod
    def read(cls, run: Path) -> RunStatus | None:
        """Of a run folder; None if no run has written any.

        Raises:
            UserError: What is written is damaged.
        """
        path = run / STATUS_FILE
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            ranks = tuple(RankStatus(**rank) for rank in values["ranks"])
            spread = values.get("spread")  # absent from what older versions have written
            return cls(**values | {"ranks": ranks, "spread": Spread(**spread) if spread else None})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); a run that goes on writes it anew; else remove it") from None

    def write(self, run: Path) -> None:
        write_whole(run / STATUS_FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    def is_silent(self, now: float) -> bool:
        """Whether a run that says it is running has not been heard for too long."""
        return self.state == "running" and now - self.written > SILENT_SECONDS

    def silent_ranks(self) -> list[RankStatus]:
        """Those that had not been heard for too long."""
        return [rank for rank in self.ranks if rank.silent_seconds > SILENT_SECONDS]
