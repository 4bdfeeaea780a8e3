"""Start the ranks of one node: `python -m launcher.node [options] launcher/run.py ARGUMENTS`.

Under srun, one a node, it needs no options: Slurm's variables say who takes part. Elsewhere each node is told by hand.
The nodes meet, and DeepSpeed's launcher starts the ranks. Signals that ask to stop reach the ranks, which save.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from launcher.rendezvous import Meeting, Store, address_of, interface_towards, meet
from launcher.run import EXIT_SEPARATED, EXIT_USER_ERROR
from launcher.stage import stage
from mdseq.errors import Separated, UserError
from mdseq.slurm import NODES_VARIABLE, START_VARIABLE
from mdseq.train.signals import stop_status

CACHES = ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


@dataclass(frozen=True)
class Place:
    """Where this node stands in the run; by default, in the step of a Slurm job.

    Attributes:
        nodes: Names of all of them.
        node: Which one this is.
        address: Of the first.
        name: Of this start of the run; the same on all nodes, and on no others.
    """

    nodes: tuple[str, ...]
    node: int
    address: str
    name: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> Place:
        """From the options, and what these lack from Slurm's variables. Raises UserError for what cannot be."""
        listed = options.nodes or os.environ.get(NODES_VARIABLE, "")
        nodes = tuple(listed.split(",")) if listed else ("localhost",)
        node = int(os.environ.get("SLURM_NODEID", "0")) if options.node is None else options.node
        if not 0 <= node < len(nodes):
            raise UserError(
                f"node {node} of {len(nodes)} ({', '.join(nodes)}): give --nodes A,B,... the same on each of them, and "
                "--node 0, 1, ... as it is counted there; or start one a node by srun"
            )
        address = options.address or os.environ.get("SLURM_LAUNCH_NODE_IPADDR", nodes[0])
        step = [os.environ.get(f"SLURM_{part}", "") for part in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
        run = f"{zlib.crc32(json.dumps([nodes, options.script, options.arguments]).encode()):08x}"
        return cls(nodes, node, address, options.name or (".".join(step) if step[0] else run))


class Node:
    """The ranks of this node, as one process to wait for and to send signals to.

    Args:
        command: What starts them.
        environment: More variables for them.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        # Slurm's signals reach all processes, DeepSpeed's launcher too, which would die of this one. The ranks, which
        # inherit that it is ignored, have a handler of their own.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self._stopped_by = 0
        self._process = subprocess.Popen(command, env=os.environ | environment)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def wait(self) -> int:
        """Exit status of the ranks: of the first that did not end well; as shells count, if that was by a signal."""
        status = self._process.wait()
        if status and self._stopped_by:  # DeepSpeed's launcher has a status of its own for that
            return stop_status(self._stopped_by)
        return status if status >= 0 else stop_status(-status)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """To the ranks themselves: DeepSpeed's launcher would kill those that take long to save."""
        self._stopped_by = number
        with suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(self._process.pid).children():
                rank.send_signal(number)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of this node; default 1")
    parser.add_argument("--nodes", default="", metavar="A,B,...", help="names of all nodes; default: of the Slurm job")
    parser.add_argument("--node", type=int, metavar="N", help="which of them this is, from 0; default: Slurm's")
    parser.add_argument("--address", default="", help="of the first node; default: Slurm's, or its name")
    parser.add_argument(
        "--name",
        default="",
        help="of the run; default: by SCRIPT and its arguments",
    )
    parser.add_argument("--network", default="", metavar="IF", help="interface between nodes, such as ib0")
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="for all nodes; default 300")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset, given to the script as --data")
    parser.add_argument("--scratch", default="", metavar="DIR", help="on this node's own disk, for a copy of --data")
    parser.add_argument("script", metavar="SCRIPT", help="launcher/run.py, or another that trains so")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (UserError, Separated) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_SEPARATED
    except KeyboardInterrupt:
        return stop_status(signal.SIGINT)


def _run(options: argparse.Namespace) -> int:
    place = Place.of(options)
    command: list[str] = [options.script, *options.arguments]
    environment = {NODES_VARIABLE: ",".join(place.nodes), START_VARIABLE: place.name}
    data = options.data
    if options.scratch:
        scratch = Path(os.path.expandvars(options.scratch))
        data = stage(data, scratch) if data is not None else None
        environment |= {variable: str(scratch) for variable in CACHES if variable not in os.environ}
    if data is not None:
        command += ["--data", str(data)]
    store = _meet(place, options)
    if len(place.nodes) > 1:
        environment |= _networks(store, options.network)
    world = {name: list(range(options.ranks)) for name in place.nodes}
    launch = [
        sys.executable, "-m", "deepspeed.launcher.launch", "--log_level=critical",
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={place.node}", f"--master_addr={store.address}", f"--master_port={store.port}",
    ]  # fmt: skip
    return Node([*launch, *command], environment).wait()


def _meet(place: Place, options: argparse.Namespace) -> Store:
    meeting = Meeting(place.name, place.nodes, place.address, options.network, options.wait)
    return meet(meeting, place.node)


def _networks(store: Store, network: str) -> dict[str, str]:
    """Which interface the ranks use, unless the user's variables say so.

    gloo would go by what the machine's own name means, which is often the loopback; NCCL finds the fastest by itself.
    """
    if network:
        address_of(network)  # says what there is instead
        chosen = {"GLOO_SOCKET_IFNAME": network, "NCCL_SOCKET_IFNAME": network}
    else:
        chosen = {"GLOO_SOCKET_IFNAME": interface_towards(store.address)}
    return {name: value for name, value in chosen.items() if value and name not in os.environ}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
