"""Real processes with a real group, gloo or NCCL on a machine with GPUs, started in well under a second each.

Ranks are forked from a server process that has imported torch and DeepSpeed and done nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 180

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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            receiving, sending = _context.Pipe(duplex=False)
            process = _context.Process(target=_enter, args=(sending, rank, num_ranks, port, function, args))
            process.start()
            sending.close()
            self.pipes.append(receiving)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def results(self) -> list[Any]:
        """What the function has returned, by rank; raises if a rank has died."""
        return [self.result(rank) for rank in range(len(self.pipes))]

    def result(self, rank: int) -> Any:
        """Of one rank; raises if it has died."""
        return _receive(self.pipes[rank], rank)


def train(*arguments: str | Path) -> int:
    """`launcher/run.py` with these arguments, as one rank; its exit status."""
    from launcher.run import main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return main([str(argument) for argument in arguments])


def _receive(pipe: Any, rank: int) -> Any:
    if not pipe.poll(TIMEOUT_SECONDS):
        raise TimeoutError(f"rank {rank} did not finish in {TIMEOUT_SECONDS} s")
    try:
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank}: {value}")
    return value


def _enter(pipe: Any, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: Any) -> None:
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
