"""Nodes find each other whatever the network is like, and say who is missing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher.rendezvous import Meeting, Store, address_of, interface_towards, meet
from mdseq.errors import Separated, UserError

_names = iter(range(10**6))


def meeting(nodes: Sequence[str] = ("n1", "n2", "n3"), seconds: float = 10.0, **more: str) -> Meeting:
    """One that no other process of this machine is likely to have."""
    name = f"{time.time_ns()}-{next(_names)}"
    return Meeting(name, nodes, **{"address": "127.0.0.1"} | more, seconds=seconds)


def outcomes(meeting: Meeting, nodes: Sequence[int]) -> list[Store | Exception]:
    """What each of these nodes gets, when they come in this order."""

    def come(node: int) -> Store | Exception:
        try:
            return meet(meeting, node)
        except (Separated, UserError) as error:
            return error

    with ThreadPoolExecutor(len(nodes)) as pool:
        futures = []
        for node in nodes:
            futures.append(pool.submit(come, node))
            time.sleep(0.1)
        return [future.result(30) for future in futures]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_get_the_same_address_and_a_free_port(order: tuple[int, ...]) -> None:
    where = meeting()
    first, *others = outcomes(where, order)
    assert isinstance(first, Store)
    assert first.address == "127.0.0.1"
    assert all(other == first for other in others)
    assert first.port in where.ports
    with socket.create_server(("", first.port)):
        pass


def test_one_node_alone_need_not_wait() -> None:
    started = time.monotonic()
    assert meet(meeting(["n1"], seconds=60), 0).address == "127.0.0.1"
    assert time.monotonic() - started < 5


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_over_ipv6() -> None:
    stores = outcomes(meeting(address="::1"), (0, 1, 2))
    assert {store.address for store in stores if isinstance(store, Store)} == {"::1"}


def test_by_name() -> None:
    assert isinstance(outcomes(meeting(address="localhost"), (0, 1, 2))[2], Store)


def test_a_network_of_the_first_node_is_what_all_are_told() -> None:
    stores = outcomes(meeting(network="lo"), (0, 1, 2))
    assert {store.address for store in stores if isinstance(store, Store)} == {"127.0.0.1"}


def test_a_network_that_there_is_not_is_answered_by_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no network ib7 with an address.*lo \(127.0.0.1\)"):
        address_of("ib7")


def test_the_interface_towards_an_address() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such name") == ""


def test_who_does_not_come_is_named_to_all_who_did() -> None:
    found = outcomes(meeting(["n1", "n2", "n3", "n4"], seconds=1.5), (0, 2))
    assert len(found) == 2
    for error in found:
        assert isinstance(error, Separated)
        assert "n2 (node 1), n4 (node 3) did not arrive within 1.5 s; 2 of 4 nodes did" in str(error)


def test_a_first_node_that_does_not_come_is_named() -> None:
    (error,) = outcomes(meeting(seconds=1.0), (1,))
    assert isinstance(error, Separated)
    assert "n2 has not met n1 within 1 s at 127.0.0.1" in str(error)


def test_an_address_that_means_nothing() -> None:
    (error,) = outcomes(meeting(address="no-such-host.invalid"), (1,))
    assert isinstance(error, UserError)
    assert "n2 does not know n1's address no-such-host.invalid" in str(error)


def test_ports_that_others_have_are_passed_over() -> None:
    """One is silent, one hangs up, one talks of something else."""
    where = meeting()
    with (
        socket.create_server(("", where.ports[0])),
        socket.create_server(("", where.ports[1])) as rude,
        socket.create_server(("", where.ports[2])) as other,
    ):

        def answer() -> None:
            for _ in range(2):
                rude.accept()[0].close()
                with other.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert len({outcome for outcome in outcomes(where, (0, 1, 2)) if isinstance(outcome, Store)}) == 1


def test_strangers_do_not_count_as_nodes() -> None:
    where = meeting(["n1", "n2"], seconds=6)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(meet, where, 0)
        time.sleep(0.2)
        for words in (b"GET / HTTP/1.0\r\n", b'{"name": "another run", "node": 1}\n', b'{"node": 1}\n', b"[1]\n", b""):
            with socket.create_connection(("127.0.0.1", where.ports[0])) as connection:
                connection.sendall(words)
        assert not host.done()
        assert meet(where, 1) == host.result(10)


def test_all_ports_taken() -> None:
    where = meeting(["n1", "n2"])
    servers = [socket.create_server(("", port)) for port in where.ports]
    try:
        with pytest.raises(Separated, match="n1 cannot listen on any of its ports"):
            meet(where, 0)
    finally:
        for server in servers:
            server.close()
