"""Ranks that meet, and who is named when one does not come."""

from __future__ import annotations

import os
import platform
import socket
import time

from mdseq.errors import Separated
from tests.dist.ranks import run_ranks

HERE = platform.node()


def meet(seconds: float = 30.0, **variables: str) -> str:
    """What a rank is told; nothing if all have come."""
    from mdseq.engine import arrival

    os.environ |= variables
    arrival.SLACK_SECONDS = 1.0
    try:
        store = arrival.meet_ranks(seconds)
    except Separated as error:
        return str(error)
    everyone = range(int(os.environ["WORLD_SIZE"]))
    for news in ("there", "done"):  # rank 0, with which the store goes, leaves last
        store.set(f"{news}/{os.environ['RANK']}", "")
        if news == "there" or os.environ["RANK"] == "0":
            store.wait([f"{news}/{rank}" for rank in everyone])
    return ""


def meet_in_turn(variables: dict[str, dict[str, str]], seconds: float) -> str:
    """Each rank with variables of its own."""
    return meet(seconds, **variables[os.environ["RANK"]])


def test_all_come_however_late() -> None:
    assert run_ranks(3, meet_late) == [""] * 3


def meet_late() -> str:
    time.sleep(0.5 * int(os.environ["RANK"]))
    return meet()


def test_a_rank_that_does_not_come_is_named_to_all_who_did_with_its_node() -> None:
    nodes = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MDSEQ_NODES": "n1,n2"}
    told = run_ranks(2, meet_in_turn, {"0": nodes, "1": nodes}, 1.0)
    assert told[0] == told[1]
    assert told[0].startswith(
        f"rank 2 on n2, rank 3 on n2 did not arrive within 1 s (guard.arrival_seconds); 2 of 4 ranks did, on {HERE};"
    )


def meet_slow_to_read() -> str:
    """Rank 1 does not read at once what rank 0 has to say."""
    from mdseq.engine import arrival

    class Slow(arrival.PrefixStore):
        def get(self, key: str) -> bytes:
            while not self.check([key]):
                time.sleep(0.05)
            time.sleep(0.3)
            return super().get(key)

    if os.environ["RANK"] == "1":
        arrival.PrefixStore = Slow
    return meet(1.0, WORLD_SIZE="3")


def test_rank_0_stays_until_the_others_have_read_why() -> None:
    told = run_ranks(2, meet_slow_to_read)
    assert told[1] == told[0]
    assert told[0].startswith("rank 2 did not arrive within 1 s")


def test_where_the_launcher_does_not_tell_nodes_the_rank_is_named() -> None:
    (told,) = run_ranks(1, meet_in_turn, {"0": {"WORLD_SIZE": "2"}}, 0.5)
    assert told.startswith("rank 1 did not arrive within 0.5 s")


def test_a_rank_0_that_cannot_be_reached() -> None:
    (told,) = run_ranks(1, meet_in_turn, {"0": {"RANK": "1", "WORLD_SIZE": "2"}}, 0.5)
    assert f"rank 1 on {HERE} has not met rank 0 within" in told
    assert "at 127.0.0.1, port " in told


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (told,) = run_ranks(1, meet_in_turn, {"0": {"MASTER_PORT": str(port)}}, 5.0)
    assert told == f"port {port} of {HERE} is taken; give --master_port another"


def test_somebody_else_at_the_port_who_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(silent.getsockname()[1])}
        (told,) = run_ranks(1, meet_in_turn, {"0": variables}, 0.5)
    assert f"rank 1 on {HERE} has not met rank 0 within 0.5 s" in told
    assert told.endswith("(whoever is there does not answer)")


def test_another_run_on_the_same_port_is_not_mistaken_for_ours() -> None:
    told = run_ranks(2, meet_in_turn, {"0": {"MDSEQ_START": "7.0"}, "1": {"MDSEQ_START": "7.1"}}, 1.0)
    assert told[0].startswith("rank 1 did not arrive")
    assert f"rank 1 on {HERE} has not met rank 0" in told[1]
