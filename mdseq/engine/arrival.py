"""How the ranks of a run find each other, who is named when one does not come, and what it looks like to lose one."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mdseq.errors import Separated
from mdseq.slurm import NODES_VARIABLE, START_VARIABLE

ARRIVAL_SECONDS = 600.0
_GONE = re.compile(
    r"gloo/transport.*(Connection (reset|closed|refused)|Broken pipe|No route to host|timed out)|remote process exited",
    re.IGNORECASE | re.DOTALL,
)
LOOK_SECONDS = 0.2
SLACK_SECONDS = 10.0  # for rank 0 to tell the others that it has given up


def meet_ranks(seconds: float = ARRIVAL_SECONDS) -> Store:
    """Wait until all ranks are there; every rank calls this, with the launcher's variables set.

    Returns:
        The store of the process group, which rank 0 hosts, or torchrun's agent.

    Raises:
        Separated: Not all have come within `seconds`, or rank 0 cannot be reached.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(seconds=seconds + SLACK_SECONDS)
    try:
        store: Store = _opened(
            lambda: TCPStore(
                address, port, num_ranks, rank == 0 and not agent, patience, wait_for_workers=False, multi_tenant=True
            ),
            patience.total_seconds() + SLACK_SECONDS,
        )
        # Should the port by now be another run's, nothing is said to it.
        store = PrefixStore(os.environ.get(START_VARIABLE, ""), store)
        store.set(f"arrived/{rank}", platform.node())
        if rank == 0:
            store.set("gathered", _gather(store, num_ranks, seconds))
        problem = store.get("gathered").decode()
    except (dist.DistError, TimeoutError) as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise Separated(f"port {port} of {platform.node()} is taken; give --master_port another") from None
        reason = str(error).splitlines()[0]
        raise Separated(
            f"rank {rank} on {platform.node()} has not met rank 0 within {seconds:g} s at {address}, port {port}: see "
            f"whether that has started, and whether a firewall stands between them ({reason})"
        ) from None
    if problem:
        with suppress(dist.DistError):
            store.set(f"heard/{rank}", "")
            if rank == 0:
                _wait_to_be_heard(store, num_ranks)
        raise Separated(problem)
    return store


def has_lost_ranks(error: BaseException) -> bool:
    """Whether this is how gloo, or NCCL, tells that another rank is gone."""
    return isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))


def _opened(open_store: Callable[[], Store], seconds: float) -> Store:
    """The store, or TimeoutError: torch itself waits without end for somebody who is there and says nothing."""
    opened: Future[Store] = Future()

    def settle() -> None:
        try:
            opened.set_result(open_store())
        except Exception as error:
            opened.set_exception(error)

    threading.Thread(target=settle, name="store", daemon=True).start()
    try:
        return opened.result(seconds)
    except TimeoutError:
        raise TimeoutError("whoever is there does not answer") from None


def _gather(store: Store, num_ranks: int, seconds: float) -> str:
    """Rank 0 waits for the others; what to say if they do not come, or nothing."""
    deadline = time.monotonic() + seconds
    missing = set(range(num_ranks))
    while missing and time.monotonic() < deadline:
        missing = {rank for rank in missing if not store.check([f"arrived/{rank}"])}
        if missing:
            time.sleep(LOOK_SECONDS)
    if not missing:
        return ""
    hosts = dict.fromkeys(store.get(f"arrived/{rank}").decode() for rank in range(num_ranks) if rank not in missing)
    return (
        f"{_named(missing)} did not arrive within {seconds:g} s (guard.arrival_seconds); {num_ranks - len(missing)} of "
        f"{num_ranks} ranks did, on {', '.join(hosts)}; see what the log says of the others, and whether their nodes "
        f"can reach {os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    )


def _wait_to_be_heard(store: Store, num_ranks: int) -> None:
    """Rank 0 takes the store along when it leaves: those that have come read there first why."""
    come = [rank for rank in range(num_ranks) if store.check([f"arrived/{rank}"])]
    store.wait([f"heard/{rank}" for rank in come], timedelta(seconds=SLACK_SECONDS))


def _named(ranks: Iterable[int]) -> str:
    """Ranks, with their nodes where the launcher has told these."""
    nodes = list(filter(None, os.environ.get(NODES_VARIABLE, "").split(",")))
    ranks_of_node = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return ", ".join(
        f"rank {rank}" + (f" on {nodes[rank // ranks_of_node]}" if rank // ranks_of_node < len(nodes) else "")
        for rank in sorted(ranks)
    )
