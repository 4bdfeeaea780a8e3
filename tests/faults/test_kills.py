"""Whatever kills a run, wherever it restarts, it goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from mdseq.engine.checkpoint import whole_checkpoints
from mdseq.model.pieces import FileDigest
from mdseq.report.metrics import read_metrics
from tests.dist.ranks import Ranks, run_ranks, train
from tests.dist.test_training import DS_CONFIGS, TINY, state

STEPS, INTERVAL, RANKS = 24, 3, 2
STATES = ("weights", "average", "exp_avg", "exp_avg_sq")


def arguments(dataset: Path, folder: Path) -> list[str | Path]:
    return [
        "--ds_config", DS_CONFIGS / "zero3_experts.json", "--data", dataset, "--output", folder, *TINY,
        f"schedule.steps={STEPS}", f"checkpoint.interval_steps={INTERVAL}", "data.micro_batch_size=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_ranks(RANKS, train, *arguments(text_dataset, folder)) == [0] * RANKS
    return folder


def newest(folder: Path) -> int:
    return max((manifest.step for _, manifest in whole_checkpoints(folder / "checkpoints")), default=0)


def assert_equal(found: Path, expected: Path) -> None:
    """To the last bit, in all that is saved; and each step is logged once."""
    assert [line["step"] for line in read_metrics(found)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in read_metrics(found)] == [line["loss"] for line in read_metrics(expected)]
    for which in STATES:
        wanted = state(expected, STEPS, which)
        for name, values in state(found, STEPS, which).items():
            assert torch.equal(values, wanted[name]), f"{which} of {name}"


@pytest.mark.slow
def test_killed_at_random_instants(undisturbed, text_dataset, tmp_path):
    """One rank or all, thirty times over; the longest lives are long enough to save."""
    folder, chance = tmp_path / "run", random.Random(0)
    for _ in range(30):
        before = newest(folder)
        with Ranks(RANKS, train, *arguments(text_dataset, folder)) as ranks:
            time.sleep(chance.uniform(0.5, 4))
            for process in chance.choice([ranks.processes, ranks.processes[:1], ranks.processes[1:]]):
                process.kill()
        assert newest(folder) >= before
        for path, manifest in whole_checkpoints(folder / "checkpoints"):
            assert {name: FileDigest.of(path / name) for name in manifest.files} == manifest.files
    assert run_ranks(RANKS, train, *arguments(text_dataset, folder)) == [0] * RANKS
    assert_equal(folder, undisturbed)


# A function in the course of a save, and whether to die before it, in the middle, or after it.
PHASES = [
    (module, name, when)
    for module, name in (
        ("mdseq.engine.checkpoint.CheckpointWriter", "_make_folder"),
        ("mdseq.engine.checkpoint.CheckpointWriter", "_copy"),
        ("mdseq.engine.checkpoint", "write_pieces"),
        ("mdseq.engine.checkpoint", "write_whole"),
        ("mdseq.engine.checkpoint.CheckpointWriter", "_seal"),
        ("mdseq.engine.checkpoint.Path", "rename"),
        ("mdseq.engine.checkpoint", "sync_folder"),
        ("mdseq.train.hooks", "remove_old_checkpoints"),
    )
    for when in ("before", "after")
] + [("mdseq.model.pieces.os", "fsync", "before"), ("mdseq.engine.checkpoint.shutil", "rmtree", "after")]


def train_and_die(module: str, name: str, when: str, *args: str | Path) -> int:
    """Train, and be killed at the third save (the first two are complete) in the given phase."""
    from pydoc import locate

    from mdseq.engine.checkpoint import CheckpointWriter

    start = CheckpointWriter.start
    owner = locate(module)
    original = getattr(owner, name)

    def deadly(*args, **kwargs):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    def start_third(self, manifest, *args, **kwargs):
        if manifest.step == 3 * INTERVAL:
            self.finish()
            setattr(owner, name, deadly)
        start(self, manifest, *args, **kwargs)

    CheckpointWriter.start = start_third
    return train(*args)


@pytest.mark.parametrize(("module", "name", "when"), PHASES, ids=lambda value: value.rpartition(".")[2])
def test_killed_in_every_phase_of_a_save(undisturbed, text_dataset, tmp_path, module, name, when):
    folder = tmp_path / "run"
    dying = Ranks(RANKS, train_and_die, module, name, when, *arguments(text_dataset, folder))
    with dying as ranks, pytest.raises(RuntimeError, match=r"rank \d died"):
        ranks.results()
    assert newest(folder) in (2 * INTERVAL, 3 * INTERVAL)  # no more than the work since the last save is lost
    assert run_ranks(RANKS, train, *arguments(text_dataset, folder)) == [0] * RANKS
    assert_equal(folder, undisturbed)
