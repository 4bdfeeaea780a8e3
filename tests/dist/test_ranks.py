"""What is told of ranks that fail, die or hang."""

from __future__ import annotations

import os
import socket
import time

import pytest

from tests.dist import ranks
from tests.dist.ranks import run_ranks


def ranks_do(*actions: str) -> int:
    """Each rank what stands at its place."""
    rank = int(os.environ["RANK"])
    if actions[rank] == "hang":
        time.sleep(1000)
    if actions[rank] == "fail":
        raise ValueError("of its own accord")
    if actions[rank] == "crash":
        os.abort()
    time.sleep(0.2 * (len(actions) - rank))  # the last is the first to finish
    return rank


def test_results_are_in_the_order_of_ranks() -> None:
    assert run_ranks(3, ranks_do, "return", "return", "return") == [0, 1, 2]


@pytest.mark.parametrize(("action", "told"), [("fail", "ValueError: of its own accord"), ("crash", "in ranks_do")])
def test_a_rank_that_fails_is_told_of_at_once_whoever_waits_for_it(action: str, told: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"(?s)rank 1.*{told}"):
        run_ranks(2, ranks_do, "hang", action)
    assert time.monotonic() - start < 60


def test_ranks_that_hang_are_named_with_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_SECONDS", 5)
    with pytest.raises(TimeoutError) as caught:
        run_ranks(3, ranks_do, "hang", "return", "hang")
    message = str(caught.value)
    assert message.count("did not finish in 5 s") == message.count("in ranks_do") == 2
    assert "rank 0 did not" in message
    assert "rank 2 did not" in message


def take_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))


def test_nobody_else_is_given_the_port() -> None:
    with pytest.raises(RuntimeError, match="Address already in use"):
        run_ranks(1, take_port)
