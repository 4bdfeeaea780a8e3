"""Seconds and memory of candidates that are compared with one another, on a machine that others use as well."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name")


def fastest_seconds(candidates: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """The fastest of a few runs of each candidate, after one to warm up.

    They take turns, so that a slow stretch of the machine falls on all alike and ratios keep their meaning.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: min(runs) for name, runs in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a run held above what this process held before it. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide what the run takes
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = memory_fields()["VmRSS"]
    run()
    return max(0, memory_fields()["VmHWM"] - before)


def slope(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent x of cost = constant * length^x, by least squares over the logarithms."""
    x, y = [math.log(length) for length in lengths], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def memory_fields() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes by field: VmHWM is the peak of VmRSS, the sum of the Rss's."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
