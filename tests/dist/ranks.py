"""Real processes with a real group, gloo or NCCL on a machine with GPUs, started in well under a second each.

Ranks are forked from a server process that has imported torch and DeepSpeed and done nothing else. Where a rank crashes
or hangs, the error shows its stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 180
END_SECONDS = 10
SHOW_AND_END = signal.SIGUSR2  # mdseq does not use it

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["deepspeed", "mdseq.train.start", "launcher.run", "torch._dynamo"])


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a group; its results, by rank.

    `function` and `args` must be importable and picklable. What ranks print goes nowhere.
    """
    with Ranks(num_ranks, function, *args) as ranks:
        return ranks.results()


class Ranks:
    """The processes of a group, running. A context: none outlives it."""

    def __init__(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> None:
        # Kept, or the port might be given to somebody else before rank 0 listens there, which this option allows it to.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        port = self._place.getsockname()[1]
        self.pipes, self.processes, self.stacks = [], [], []
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(num_ranks):
            receiving, sending = _context.Pipe(duplex=False)
            stacks = Path(self._folder.name, f"rank-{rank}")
            stacks.touch()
            process = _context.Process(target=_enter, args=(sending, stacks, rank, num_ranks, port, function, args))
            process.start()
            sending.close()
            self.pipes.append(receiving)
            self.processes.append(process)
            self.stacks.append(stacks)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for process in self.processes:
            process.join(0 if failed else END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._place.close()
        self._folder.cleanup()

    def results(self) -> list[Any]:
        """What the function has returned, by rank; raises once any rank has failed or died."""
        return self._wait(range(len(self.pipes)))

    def result(self, rank: int) -> Any:
        """Of one rank; raises if it has failed or died."""
        return self._wait([rank])[0]

    def _wait(self, ranks: Sequence[int]) -> list[Any]:
        """For all at once: while one that has failed can tell why, others may wait for it forever."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        missing = {self.pipes[rank]: rank for rank in ranks}
        values = {}
        while missing:
            ready = connection.wait(missing, deadline - time.monotonic())
            if not ready:
                raise TimeoutError(self._end_late(missing.values()))
            for pipe in ready:
                rank = missing.pop(pipe)
                values[rank] = self._receive(rank)
        return [values[rank] for rank in ranks]

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, value = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            raise RuntimeError(f"rank {rank} died\n{self.stacks[rank].read_text()}") from None
        if not succeeded:
            raise RuntimeError(f"rank {rank}: {value}")
        return value

    def _end_late(self, ranks: Collection[int]) -> str:
        """End ranks that have not finished in time; where each was."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, SHOW_AND_END)
        for rank in ranks:
            self.processes[rank].join(END_SECONDS)
        return "\n".join(
            f"rank {rank} did not finish in {TIMEOUT_SECONDS} s\n{self.stacks[rank].read_text()}" for rank in ranks
        )


def train(*arguments: str | Path) -> int:
    """`launcher/run.py` with these arguments, as one rank; its exit status."""
    from launcher.run import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return main([str(argument) for argument in arguments])


def _enter(
    pipe: Any, stacks: Path, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    told = os.open(stacks, os.O_WRONLY)
    faulthandler.enable(told)
    faulthandler.register(SHOW_AND_END, told, chain=True)  # the signal itself then ends the process
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        answer = True, function(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    # By value: multiprocessing would share the memory of tensors, which ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
