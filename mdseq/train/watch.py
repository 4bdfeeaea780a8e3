"""Ends a run in which a rank hangs, and names the rank."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import torch.distributed as dist

from mdseq.engine import waiting

EXIT_HUNG = 5
HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 5 * HEARTBEAT_SECONDS
# Whoever stands in these waits for the others, or for a GPU that does.
_WAITING_ROOMS = (f"{os.sep}torch{os.sep}", f"{os.sep}deepspeed{os.sep}", waiting.__file__)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last told of itself.

    Attributes:
        count: Of its heartbeats: a rank whose count stands still is stopped, or gone.
        step: Steps it has taken.
        place: Where its main thread is.
        waits: Whether that is in a library, where it may be waiting for the others.
        host: Its node's name.
    """

    count: int
    step: int
    place: str
    waits: bool
    host: str


Hear = Callable[[Sequence[Heartbeat | None]], None]


@dataclass(frozen=True)
class Limit:
    """How long something may take, and what to say when it takes longer."""

    seconds: float
    complaint: str


class Watch:
    """A thread of each rank that ends the process when its work does not go on for too long. A context.

    Each rank tells the others where it is every HEARTBEAT_SECONDS, through the process group's store. When time is up,
    those that no longer tell, or are not waiting for the others, are named.

    Args:
        step: How many steps this rank has taken, or whatever else its work consists of.
        limit: Of one step.
        first: Of the first one, if not the same.
        hear: Called with the newest heartbeats of all ranks, every HEARTBEAT_SECONDS.
        end: Called in the end, with the exit status.
    """

    def __init__(
        self,
        step: Callable[[], int],
        limit: Limit,
        first: Limit | None = None,
        hear: Hear | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._step = step
        self._limit = limit
        self._first = first or limit
        self._hear = hear
        self._end = end
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        first = seen = self._step()
        since, count = time.monotonic(), 0
        try:
            self._tell(count, seen)  # where it is, should it never tell again
            while not self._over.wait(HEARTBEAT_SECONDS):
                count += 1
                step = self._step()
                if step != seen:
                    seen, since = step, time.monotonic()
                self._tell(count, step)
                if self._hear is not None:
                    self._hear(self._all_heard())
                limit = self._limit if step > first else self._first
                if time.monotonic() - since > limit.seconds:
                    self._finish(step, limit.complaint)
                    return
        except dist.DistError:  # the store is gone
            if not self._over.wait(STALE_SECONDS):
                self._end_alone()

    def _tell(self, count: int, step: int) -> None:
        frame = sys._current_frames().get(self._main or 0)
        beat = Heartbeat(count, step, _place(frame), _waits(frame), platform.node())
        self._store.set(f"heartbeat/{self._rank}", json.dumps(asdict(beat)))

    def _finish(self, step: int, complaint: str) -> None:
        # Where the link to rank 0 is cut, its store does not answer.
        alone = threading.Timer(3 * STALE_SECONDS, self._end_alone)
        alone.daemon = True
        alone.start()
        before = self._all_heard()
        if self._over.wait(STALE_SECONDS):  # another rank has ended the run already
            alone.cancel()
            return
        self._tell(2**31, step)  # this rank's own is not stale
        after = self._all_heard()
        alone.cancel()
        if self._hear is not None:
            self._hear(after)
        print(hang_report(complaint, before, after), file=sys.stderr, flush=True)
        self._end(EXIT_HUNG)

    def _end_alone(self) -> None:
        print(f"error: rank {self._rank} on {platform.node()} has lost rank 0", file=sys.stderr, flush=True)
        self._end(EXIT_HUNG)

    def _all_heard(self) -> list[Heartbeat | None]:
        return [self._heard(rank) for rank in range(self._num_ranks)]

    def _heard(self, rank: int) -> Heartbeat | None:
        key = f"heartbeat/{rank}"
        return Heartbeat(**json.loads(self._store.get(key))) if self._store.check([key]) else None


def hang_report(complaint: str, before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> str:
    """Who holds up the run, from two rounds of heartbeats."""
    names = [f"rank {rank}" + (f" on {beat.host}" if beat else "") for rank, beat in enumerate(after)]
    silent = [rank for rank, (b, a) in enumerate(zip(before, after, strict=True)) if a is None or a == b]
    busy = [rank for rank, beat in enumerate(after) if beat and not beat.waits and rank not in silent]
    lines = [f"error: {complaint}"]
    lines += [f"  {names[rank]} gives no sign of life" for rank in silent]
    lines += [f"  {names[rank]} is not waiting for the others: it is at {after[rank].place}" for rank in busy]  # type: ignore[union-attr]
    if not silent and not busy:
        lines += [f"  {names[rank]} is at {beat.place}" for rank, beat in enumerate(after) if beat]
    return "\n".join(lines)


def _place(frame: FrameType | None) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "no line"


def _waits(frame: FrameType | None) -> bool:
    return frame is not None and any(room in frame.f_code.co_filename for room in _WAITING_ROOMS)
