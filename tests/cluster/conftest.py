"""The Slurm that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import NODES, Slurm, wait_until, why_missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A real Slurm of two nodes of two CPUs; a test that kills a node starts it again."""
    if reason := why_missing():
        pytest.skip(reason)
    with Slurm() as cluster:
        yield cluster


@pytest.fixture
def near(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The cluster, found by this process; no job is left behind, and no dead node."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    yield slurm
    slurm.run("scancel", "--user=root")
    for node in NODES:
        slurm.start_node(node)
    wait_until(lambda: "down" not in map(slurm.node_state, NODES), 30, "both nodes up")
