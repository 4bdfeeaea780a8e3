"""The Slurm that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Slurm, why_missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A real Slurm of two nodes of two CPUs; a test that kills a node starts it again."""
    if reason := why_missing():
        pytest.skip(reason)
    with Slurm() as cluster:
        yield cluster
