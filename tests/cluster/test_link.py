"""Two nodes whose only link is cut while they train, each in a network namespace of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mdseq.engine.checkpoint import whole_checkpoints
from mdseq.report.status import RunStatus
from tests.cluster.slurm import wait_until
from tests.dist.test_training import DS_CONFIGS, TINY, run, state

ROOT = Path(__file__).parents[2]
STEPS = 150
RUN = ["data.micro_batch_size=2", "checkpoint.interval_steps=10", f"schedule.steps={STEPS}"]


class Link:
    """Two namespaces, each with its end of a cable. A context."""

    def __init__(self) -> None:
        self.names = [f"mdseq-{secrets.token_hex(3)}-{node}" for node in (1, 2)]

    def __enter__(self) -> Link:
        first, second = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
            for number, name in enumerate(self.names, start=1):
                _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


@pytest.fixture
def link() -> Iterator[Link]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("namespaces need root, iproute2 and unshare")
    try:
        made = Link().__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this container may not make network namespaces: {error.stderr.decode().strip()}")
    yield made
    made.__exit__()


def start(link: Link, number: int, folder: Path, dataset: Path) -> subprocess.Popen[bytes]:
    """A supervised node; what it prints goes to a file."""
    node = [
        sys.executable, "-m", "launcher.node", "--nodes", "n1,n2", "--node", str(number), "--address", "10.77.0.1",
        "--name", folder.parent.name, "--wait", "120", "--data", dataset, ROOT / "launcher/run.py", "--ds_config",
        DS_CONFIGS / "zero3_experts.json", "--output", folder, *TINY, *RUN, "guard.hang_seconds=5",
    ]  # fmt: skip
    supervised = [sys.executable, "-m", "launcher.supervise", "--run", folder, "--wait", "1", "--", *node]
    named = ["unshare", "--uts", "sh", "-c", f'hostname n{number + 1}; exec "$@"', "sh"]
    with (folder.parent / f"n{number + 1}.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", link.names[number], *named, *map(str, supervised)],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_a_cut_link_ends_the_run_which_goes_on_when_it_is_mended(link: Link, text_dataset, tmp_path) -> None:
    folder = tmp_path / "run"
    nodes = [start(link, number, folder, text_dataset) for number in (0, 1)]
    logs = [tmp_path / "n1.log", tmp_path / "n2.log"]
    try:
        wait_until(lambda: bool(whole_checkpoints(folder / "checkpoints")), 120, "a checkpoint")
        link.cut()
        for log in logs:
            wait_until(lambda log=log: "ended with status 5; restart 1" in log.read_text(), 90, f"{log} to tell")
        link.mend()
        assert [node.wait(240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, 9)
        print(*(log.read_text() for log in logs), sep="\n-----\n")
    told = [log.read_text() for log in logs]
    assert "error: no step for 5 s; if nothing hangs, raise guard.hang_seconds" in told[0]
    assert "rank 1 on n2 gives no sign of life" in told[0]
    assert "rank 1 on n2 has lost rank 0" in told[1]
    status = RunStatus.read(folder)
    assert status is not None
    assert (status.state, status.step, status.starts) == ("finished", STEPS, 2)
    undisturbed = run(text_dataset, tmp_path / "calm", 2, "zero3_experts", *RUN)
    expected = state(undisturbed, STEPS)
    assert all(torch.equal(weight, expected[name]) for name, weight in state(folder, STEPS).items())
