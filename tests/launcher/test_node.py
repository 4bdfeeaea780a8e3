"""Ranks of several nodes, here all on this machine, know each other, and signals find them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import node
from launcher.run import EXIT_SEPARATED, EXIT_USER_ERROR
from tests.cluster.slurm import wait_until

ROOT = Path(__file__).parents[2]

# Leaves what it was started with in a file; then ends with a status, or waits for a signal and ends as training does.
RANK = """
import json, os, signal, sys, time
folder, ending = sys.argv[2], sys.argv[3]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
         "MDSEQ_NODES", "TMPDIR")
told = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[4:]}
if ending == "wait":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
with open(f"{folder}/{told['RANK']}.tmp", "w") as file:
    json.dump(told, file)
os.rename(file.name, f"{folder}/{told['RANK']}")
if ending == "wait":
    time.sleep(60)
sys.exit(int(ending))
"""


class Nodes:
    """Two nodes, each of so many ranks."""

    def __init__(self, folder: Path, ending: str, *options: str, ranks: int = 1) -> None:
        self.folder = folder
        script = folder / "a script.py"
        script.write_text(RANK)
        environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        environment |= {"DS_ACCELERATOR": "cpu"}
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "launcher.node", "--nodes", "n1,n2", "--node", str(number), "--address",
                    "127.0.0.1", "--name", str(folder), "--ranks", str(ranks), *options,
                    str(script), str(folder), ending, "--more", "a b",
                ],
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for number in (0, 1)
        ]  # fmt: skip

    def statuses(self) -> list[int]:
        try:
            return [process.wait(60) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def told(self, num_ranks: int) -> list[dict]:
        wait_until(lambda: all((self.folder / f"{rank}").exists() for rank in range(num_ranks)), 60, "all ranks")
        return [json.loads((self.folder / f"{rank}").read_text()) for rank in range(num_ranks)]


def test_ranks_are_numbered_over_the_nodes_and_share_a_store(tmp_path: Path, text_dataset: Path) -> None:
    nodes = Nodes(
        tmp_path, "0", "--data", str(text_dataset), "--scratch", str(tmp_path / "${HOME:-x}" / "disk"), ranks=2
    )
    assert nodes.statuses() == [0, 0]
    told = nodes.told(4)
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in told] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert len({one["MASTER_PORT"] for one in told}) == 1
    for one in told:
        assert (one["WORLD_SIZE"], one["LOCAL_SIZE"], one["MASTER_ADDR"]) == ("4", "2", "127.0.0.1")
        assert (one["MDSEQ_NODES"], one["GLOO_SOCKET_IFNAME"]) == ("n1,n2", "lo")
        more, value, data, copy = one["arguments"]
        assert (more, value, data) == ("--more", "a b", "--data")
        assert (Path(copy) / "manifest.json").read_bytes() == (text_dataset / "manifest.json").read_bytes()
        assert Path(copy).is_relative_to(one["TMPDIR"])


@pytest.mark.parametrize("how", ["time is nearly up", "terminated", "all of a node are"])
def test_signals_reach_the_ranks_and_their_status_is_that_of_the_node(tmp_path: Path, how: str) -> None:
    nodes = Nodes(tmp_path, "wait")
    nodes.told(2)
    for process in nodes.processes:
        if how == "time is nearly up":  # Slurm tells every process
            os.killpg(process.pid, signal.SIGUSR1)
        elif how == "terminated":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
    expected = signal.SIGUSR1 if how == "time is nearly up" else signal.SIGTERM
    started = time.monotonic()
    assert nodes.statuses() == [128 + expected] * 2
    assert time.monotonic() - started < 20


def test_the_status_of_a_rank_is_that_of_its_node(tmp_path: Path) -> None:
    assert Nodes(tmp_path, "5").statuses() == [5, 5]


def test_a_node_that_does_not_come_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "n1,n2", "--node", "0", "--name", str(tmp_path), "--wait", "0.5", "script.py"]
    assert node.main(options) == EXIT_SEPARATED
    assert capsys.readouterr().err.startswith("error: n2 (node 1) did not arrive within 0.5 s")


def test_a_node_that_is_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert node.main(["--nodes", "n1,n2", "--node", "2", "script.py"]) == EXIT_USER_ERROR
    assert "node 2 of 2 (n1, n2): give --nodes A,B,..." in capsys.readouterr().err
