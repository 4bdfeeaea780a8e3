"""Jobs over shards on the cores of one machine: as many processes as asked for, none that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.jobs import Advance, ShardJobs
from data_prep.workers import worker_context
from mdseq.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.2


class Pool:
    """Runs functions and jobs in `workers` processes; with one, in this process."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = worker_context()
            self._done = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (self._done,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # nothing that still runs is of use
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]], advance: Advance) -> Iterator[Any]:
        """function(*item) of each item, in order; `advance` is called with 1 for each."""
        if self._pool is None:
            for item in items:
                yield function(*item)
                advance(1)
            return
        futures = [self._pool.submit(function, *item) for item in items]
        with self._explained():
            for future in futures:
                yield future.result()
                advance(1)

    def run(
        self,
        folder: Path,
        job: str,
        tasks: Sequence[tuple[Any, ...]],
        advance: Advance = lambda num_bytes: None,
        on_result: Callable[[tuple[Any, ...], Any], None] = lambda task, result: None,
    ) -> list[Any]:
        """What `ShardJobs.<job>(*task)` gives for each task, the shard first in it.

        `advance` hears of the bytes of text that are dealt with, `on_result` of each result as it comes.
        """
        if self._pool is None:
            jobs = ShardJobs(folder, advance)
            results = []
            for task in tasks:
                results.append(getattr(jobs, job)(*task))
                on_result(task, results[-1])
            return results
        futures = {self._pool.submit(_run_job, folder, job, task): task for task in tasks}
        seen = self._done.value
        waiting: set[Future[Any]] = set(futures)
        with self._explained():
            while waiting:
                finished, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in finished:
                    on_result(futures[future], future.result())
                done = self._done.value
                advance(done - seen)
                seen = done
        return [future.result() for future in futures]

    def _explained(self) -> _Explained:
        return _Explained(self._workers)


class _Explained:
    """Turns the death of a worker into a message."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                f"one of {self._workers} worker processes was killed, most often for lack of memory; the same command "
                "goes on where it stopped, better with fewer WORKERS"
            ) from None


_progress: Any = None
_jobs: dict[Path, ShardJobs] = {}


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that is killed cannot close the pool, and the queues alone would keep its workers waiting."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _advance(num_bytes: int) -> None:
    with _progress.get_lock():
        _progress.value += num_bytes


def _run_job(folder: Path, job: str, arguments: tuple[Any, ...]) -> Any:
    if folder not in _jobs:
        _jobs[folder] = ShardJobs(folder, _advance)
    return getattr(_jobs[folder], job)(*arguments)
