"""How far a long job is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
_SCALES = {"bytes": (1e6, "MB", ",.1f"), "files": (1, "files", ",.0f"), "shards": (1, "shards", ",.0f")}


class Stage:
    """Context of one stage of the job, which counts bytes of text, files or shards; the total may be unknown."""

    def __init__(
        self, title: str, total: int | None = None, unit: Literal["bytes", "files", "shards"] = "bytes"
    ) -> None:
        self._title = title
        self._total = total
        self._scale, self._unit, self._form = _SCALES[unit]
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Stage:
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total, rate="")
            self._bar.start()
        else:
            print(f"{self._title} ...", file=sys.stderr, flush=True)
        return self

    def expect(self, total: int) -> None:
        """Add to the total."""
        self._total = (self._total or 0) + total
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif self._done and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._title}: {self._rate()}{self._time_left()}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self) -> str:
        total = f" of {self._total / self._scale:{self._form}}" if self._total else ""
        return (
            f"{self._done / self._scale:{self._form}}{total} {self._unit}, "
            f"{self._done / self._scale / self._seconds():,.1f} {self._unit}/s"
        )

    def _time_left(self) -> str:
        if not self._total:
            return ""
        minutes, seconds = divmod(round(self._seconds() * max(self._total - self._done, 0) / self._done), 60)
        return f", {minutes}m{seconds:02d}s left"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)
