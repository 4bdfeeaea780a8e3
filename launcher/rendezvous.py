"""Where the nodes of a run find each other: one of them listens, the others come, and all learn where to go on.

The first node listens on the first of a few ports that is free; which these are follows from the name of the run, so
nobody needs to be told. The others try them all until one answers with that name: on a port that somebody else has,
nobody does. When all have come, the first tells them the address, and another of these ports for torch's store.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

import psutil

from mdseq.errors import Separated, UserError

NUM_PORTS = 16
FIRST_PORT, LAST_PORT = 20_000, 30_000  # systems give none of these to whoever asks for any
ATTEMPT_SECONDS = 3.0
PAUSE_SECONDS = 0.2
MAX_LINE = 65_536


@dataclass(frozen=True)
class Meeting:
    """Who is to meet, and where.

    Attributes:
        name: What no other meeting on these machines is called, such as the number of a Slurm step.
        nodes: Their names, the first one's first.
        address: Of the first node, as the others reach it: a name, or an address of IPv4 or IPv6.
        network: Interface of the first node whose address torch shall use; empty: the one that the others have reached.
        seconds: How long to wait for all.
    """

    name: str
    nodes: Sequence[str]
    address: str
    network: str = ""
    seconds: float = 300.0

    @property
    def ports(self) -> range:
        """Where the first node may listen."""
        places = (LAST_PORT - FIRST_PORT) // NUM_PORTS
        first = FIRST_PORT + NUM_PORTS * (zlib.crc32(self.name.encode()) % places)
        return range(first, first + NUM_PORTS)


@dataclass(frozen=True)
class Store:
    """Where torch's store of this run will be."""

    address: str
    port: int


def meet(meeting: Meeting, node: int) -> Store:
    """Wait until all nodes are there; every node calls this.

    Args:
        meeting: The same on every node.
        node: This one, counted from 0.

    Raises:
        Separated: Not all have come in time; it names those that have not, or, where the first cannot be reached, that.
        UserError: The first node's address, or network, means nothing.
    """
    return _Host(meeting).wait() if node == 0 else _visit(meeting, node)


class _Host:
    """The first node's side."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self._came: dict[int, _Line] = {}

    def wait(self) -> Store:
        meeting = self.meeting
        missing = set(range(1, len(meeting.nodes)))
        deadline = time.monotonic() + meeting.seconds
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(self._listen())
            while missing and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    visitor, _ = listener.accept()
                    missing.discard(self._receive(stack.enter_context(visitor)))
            if missing:
                problem = _missing(meeting, sorted(missing))
                self._tell({"error": problem})
                raise Separated(problem)
            lines = list(self._came.values())
            visited = lines[0].connection.getsockname()[0] if lines else "127.0.0.1"
            address = address_of(meeting.network) if meeting.network else _plain(visited)
            with self._listen() as free:
                store = Store(address, free.getsockname()[1])
            self._tell(asdict(store))
            return store

    def _listen(self) -> socket.socket:
        for port in self.meeting.ports:
            with contextlib.suppress(OSError):
                return _listener(port)
        host, ports = self.meeting.nodes[0], self.meeting.ports
        raise Separated(f"{host} cannot listen on any of its ports {ports[0]} to {ports[-1]}: all are taken")

    def _receive(self, visitor: socket.socket) -> int:
        """Which node it is; raises for anybody else."""
        line = _Line(visitor)
        hello = line.read(ATTEMPT_SECONDS)
        node = int(hello["node"])
        if hello["name"] != self.meeting.name or not 0 < node < len(self.meeting.nodes):
            raise ValueError
        line.write({"name": self.meeting.name})
        self._came[node] = line  # of one that has come twice, the second time counts
        return node

    def _tell(self, answer: dict[str, Any]) -> None:
        for line in self._came.values():
            with contextlib.suppress(OSError):
                line.write(answer)


def _visit(meeting: Meeting, node: int) -> Store:
    """The other nodes' side."""
    here, host = meeting.nodes[node], meeting.nodes[0]
    deadline = time.monotonic() + meeting.seconds
    reason = ""
    while time.monotonic() < deadline:
        for port in meeting.ports:
            try:
                with socket.create_connection((meeting.address, port), ATTEMPT_SECONDS) as connection:
                    line = _Line(connection)
                    line.write({"name": meeting.name, "node": node})
                    if line.read(ATTEMPT_SECONDS).get("name") != meeting.name:
                        continue
                    # The others may come as late as they are allowed to, and the host is given time to tell.
                    answer = line.read(max(0.0, deadline - time.monotonic()) + 2 * ATTEMPT_SECONDS)
                if "error" in answer:
                    raise Separated(answer["error"])
                return Store(answer["address"], answer["port"])
            except socket.gaierror as error:
                raise UserError(f"{here} does not know {host}'s address {meeting.address}: {error.strerror}") from None
            except (OSError, ValueError) as error:
                reason = str(error)
        time.sleep(PAUSE_SECONDS)
    ports = meeting.ports
    raise Separated(
        f"{here} has not met {host} within {meeting.seconds:g} s at {meeting.address}, ports {ports[0]} to {ports[-1]} "
        f"({reason}); see whether {host} has started, and whether a firewall stands between them"
    )


def _missing(meeting: Meeting, missing: Sequence[int]) -> str:
    names = ", ".join(f"{meeting.nodes[node]} (node {node})" for node in missing)
    came = len(meeting.nodes) - len(missing)
    return (
        f"{names} did not arrive within {meeting.seconds:g} s; {came} of {len(meeting.nodes)} nodes did. See what the "
        f"log says of {'it' if len(missing) == 1 else 'them'}, and whether {meeting.address} can be reached from there"
    )


def address_of(network: str) -> str:
    """An address of one of this machine's network interfaces; of IPv4 rather than IPv6.

    Raises:
        UserError: There is no such interface, or it has none; naming those that have.
    """
    found = {name: list(_addresses(name)) for name in psutil.net_if_addrs()}
    if found.get(network):
        return found[network][0]
    known = ", ".join(f"{name} ({addresses[0]})" for name, addresses in found.items() if addresses)
    raise UserError(
        f"{socket.gethostname()} has no network {network} with an address (cluster.network); it has {known}"
    )


def interface_towards(address: str) -> str:
    """The name of this machine's network interface by which an address is reached; empty if that cannot be told."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of datagrams: nothing is sent
            here = _plain(probe.getsockname()[0])
    except OSError:
        return ""
    return next((name for name in psutil.net_if_addrs() if here in _addresses(name)), "")


def _addresses(network: str) -> Iterator[str]:
    given = psutil.net_if_addrs()[network]
    for family in (socket.AF_INET, socket.AF_INET6):
        yield from (item.address for item in given if item.family == family)


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # built with it, and yet without it
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _plain(address: str) -> str:
    """An address of IPv4 as such, even if it came over a socket of both kinds."""
    parsed = ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped) if mapped else address


class _Line:
    """A connection over which each side says one line after another."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._file = connection.makefile("rb")  # two lines may come at once

    def write(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds: float) -> dict[str, Any]:
        """Raises ValueError for what is none of ours, and OSError."""
        self.connection.settimeout(seconds)
        message = json.loads(self._file.readline(MAX_LINE))
        if not isinstance(message, dict):
            raise ValueError("an answer of another kind")
        return message
