"""How long a rank itself takes for a step, and how long it waits for the others.

In synchronous training the steps of all ranks take equally long, for the fast ranks wait in collectives for the slow
one. What tells them apart is a rank's own time: that of the step less that of its waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Under whatever name a collective is called, by DeepSpeed, AutoEP or mdseq, one of these starts it, if torch has it.
_COLLECTIVES = (
    "broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "all_gather_single", "_allgather_base",
    "allgather_coalesced", "all_gather_single_coalesced", "allgather_into_tensor_coalesced", "gather", "scatter",
    "reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "all_to_all_single", "alltoall_base", "alltoall", "send", "recv",
    "recv_anysource", "barrier", "monitored_barrier", "_end_coalescing",
)  # fmt: skip

Mark = Any  # a point in time: of time.perf_counter(), or an event of the GPU's stream


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of one step of one rank went.

    Attributes:
        step: All of it.
        waiting: For other ranks.
        data: For micro-batches to be read.
    """

    step: float
    waiting: float
    data: float

    @property
    def own(self) -> float:
        """What the rank took itself, its data included."""
        return max(0.0, self.step - self.waiting)


class StepClock:
    """Measures every few steps, and costs nothing in those between.

    During a measured step, marks are put around whatever lets a rank wait for another: the start of a collective, the
    wait for its end and, on a GPU, the waits of and for streams, where collectives go on beside the computation. The
    marks are the host's clock on a CPU. On a GPU they are events of the stream that computes, wherever the wait is: the
    time between two is then how long that stream stood still, be it that the stream or the host waited, and what went
    on beside its work counts as none. They are read when `take` asks, so nothing waits for them during the step.

    The time of a collective that is not caught, such as one that C++ starts by itself, counts as the rank's own. That
    of transfers counts as waiting, so a slow link makes nobody's own time longer.

    Args:
        device: That computes.
        interval_steps: Measures the steps that are multiples of it, but never the first one seen, which is start-up; 0
            measures none.
    """

    def __init__(self, device: torch.device, interval_steps: int) -> None:
        self._device = device
        self._interval_steps = interval_steps
        self._mark: Callable[[], Mark] = time.perf_counter
        self._is_first = True
        self._is_measuring = False
        self._step: list[tuple[Mark, Mark]] = []
        self._waits: list[tuple[Mark, Mark]] = []
        self._reads: list[tuple[Mark, Mark]] = []

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around step `number`."""
        is_first, self._is_first = self._is_first, False
        if is_first or not self._interval_steps or number % self._interval_steps:
            return nullcontext()
        return self._measured()

    def data(self) -> AbstractContextManager[None]:
        """Around getting the micro-batches, within a step."""
        return self._noted(self._reads) if self._is_measuring else nullcontext()

    def take(self) -> StepSeconds | None:
        """Of the step that was measured since the last call, if one was; waits for the GPU to have finished it."""
        if not self._step:
            return None
        found = StepSeconds(self._seconds(self._step), self._seconds(self._waits), self._seconds(self._reads))
        self._step = []
        return found

    @contextmanager
    def _measured(self) -> Iterator[None]:
        self._waits, self._reads = [], []
        owners: list[tuple[Any, tuple[str, ...]]] = [
            (dist.ProcessGroup, _COLLECTIVES),
            (dist.Work, ("wait",)),
        ]
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            self._mark = lambda: stream.record_event(torch.cuda.Event(enable_timing=True))
            owners += [
                (torch.cuda.Event, ("wait", "synchronize")),
                (torch.cuda.Stream, ("synchronize",)),
                (torch.cuda, ("synchronize",)),
            ]
        with ExitStack() as stack:
            for owner, names in owners:
                for name in names:
                    if name in vars(owner):
                        stack.enter_context(self._timed(owner, name))
            self._is_measuring = True
            stack.callback(setattr, self, "_is_measuring", False)
            step: list[tuple[Mark, Mark]] = []
            with self._noted(step):
                yield
        self._step = step  # a step that was broken off is none

    @contextmanager
    def _timed(self, owner: Any, name: str) -> Iterator[None]:
        """Inside, the waits include the calls of an attribute of a class or module."""
        function = vars(owner)[name]

        def timed(*args: Any, **options: Any) -> Any:
            with self._noted(self._waits):
                return function(*args, **options)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, function)

    @contextmanager
    def _noted(self, spans: list[tuple[Mark, Mark]]) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            spans.append((start, self._mark()))

    def _seconds(self, spans: list[tuple[Mark, Mark]]) -> float:
        if self._device.type != "cuda":
            return sum(end - start for start, end in spans)
        for _, end in spans[-1:]:
            end.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000
