"""How far a long job is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class Stage:
    """Context of one stage of the job, which counts megabytes; `total_bytes` may be unknown."""

    def __init__(self, title: str, total_bytes: int | None = None) -> None:
        self._title = title
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Stage:
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total_bytes, rate="")
            self._bar.start()
        else:
            print(f"{self._title} ...", file=sys.stderr, flush=True)
        return self

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done_bytes, rate=self._rate())
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._title}: {self._rate()}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        total = f" of {self._total_bytes / 1e6:,.1f}" if self._total_bytes else ""
        return f"{self._done_bytes / 1e6:,.1f}{total} MB, {self._done_bytes / 1e6 / seconds:,.1f} MB/s"
