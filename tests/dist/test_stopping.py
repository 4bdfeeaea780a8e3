"""A run that is asked to stop saves first, one that hangs or diverges says why, on all ranks together."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from launcher.run import EXIT_SEPARATED
from mdseq.engine.checkpoint import whole_checkpoints
from mdseq.report.metrics import read_metrics
from mdseq.report.status import RunStatus
from mdseq.train.watch import EXIT_HUNG
from tests.dist.ranks import Ranks, run_ranks, train
from tests.dist.test_training import DS_CONFIGS, TINY, losses, state


def arguments(dataset: Path, folder: Path, *more: str, ds_config: str = "zero3_experts") -> list[str | Path]:
    return [
        "--ds_config", DS_CONFIGS / f"{ds_config}.json", "--data", dataset, "--output", folder, *TINY,
        "data.micro_batch_size=1", "schedule.decay=constant", *more,
    ]  # fmt: skip


def wait_for_steps(folder: Path, steps: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while len(read_metrics(folder)) < steps:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_any_rank_stops_all_after_the_step_and_nothing_is_lost(text_dataset, tmp_path, number):
    with Ranks(2, train, *arguments(text_dataset, tmp_path / "run", "schedule.steps=100000")) as ranks:
        wait_for_steps(tmp_path / "run", 3)
        os.kill(ranks.processes[1].pid, number)
        assert ranks.results() == [128 + number] * 2
    steps = read_metrics(tmp_path / "run")[-1]["step"]
    status = RunStatus.read(tmp_path / "run")
    assert status is not None
    assert (status.state, status.step) == ("stopped", steps)
    assert [manifest.step for _, manifest in whole_checkpoints(tmp_path / "run" / "checkpoints")] == [steps]

    # It goes on as one that was never stopped.
    for folder in ("run", "whole"):
        more = (f"schedule.steps={steps + 2}",)
        assert run_ranks(2, train, *arguments(text_dataset, tmp_path / folder, *more)) == [0, 0]
    assert torch.equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [node["ranks"] for node in environment["nodes"].values()] == [[0, 1]]
    assert len(environment["earlier_starts"]) == 1


def test_a_second_signal_stops_at_once(text_dataset, tmp_path):
    """Here while the first waits for a step that does not end."""
    options = arguments(text_dataset, tmp_path / "run", "schedule.steps=100000")
    with Ranks(2, train_and_hang, *options) as ranks:
        wait_for_steps(tmp_path / "run", 4)
        time.sleep(0.5)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        time.sleep(3.5)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        ranks.processes[0].join(10)
        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
        ranks.processes[1].kill()
    assert whole_checkpoints(tmp_path / "run" / "checkpoints") == []


def train_and_hang(*options: str | Path, before_step: int = 4) -> int:
    """Rank 1 does not take its next step, or with -1, does not come to the first."""
    from mdseq.data.loader import Loader
    from mdseq.train.loop import Trainer

    make, take = Loader.__init__, Trainer._take_step

    def sleepy_make(self, *args):
        make(self, *args)
        if before_step == -1 and self.rank == 1:
            time.sleep(1000)

    def sleepy_take(self):
        if self.step == before_step and self.agreement.rank == 1:
            time.sleep(1000)
        take(self)

    Loader.__init__, Trainer._take_step = sleepy_make, sleepy_take
    return train(*options)


def train_and_hang_loudly(errors: str, before_step: int, *options: str | Path) -> int:
    with open(f"{errors}-{os.environ['RANK']}", "w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
    return train_and_hang(*options, before_step=before_step)


def hung_run(folder: Path, before_step: int, *options: str | Path) -> str:
    """What the ranks tell."""
    with Ranks(2, train_and_hang_loudly, str(folder / "errors"), before_step, *options) as ranks:
        for process in ranks.processes:
            process.join(60)
        assert EXIT_HUNG in [process.exitcode for process in ranks.processes]
    told = "".join((folder / f"errors-{rank}").read_text() for rank in range(2))
    assert f"rank 1 on {platform.node()} is not waiting for the others: it is at" in told
    assert "rank 0 on" not in told
    return told


def test_a_rank_that_hangs_is_named_and_the_run_ends(text_dataset, tmp_path):
    options = arguments(text_dataset, tmp_path / "run", "schedule.steps=100000", "guard.hang_seconds=4")
    told = hung_run(tmp_path, 4, *options)
    assert "error: no step for 4 s; if nothing hangs, raise guard.hang_seconds" in told
    assert "(sleepy_take)" in told
    status = RunStatus.read(tmp_path / "run")
    assert status is not None
    assert status.state in ("failed", "running"), "rank 0 was told by an error, or was ended first"
    assert [rank.host for rank in status.ranks] == [platform.node()] * 2
    assert [rank.step for rank in status.ranks] == [status.step] * 2


@pytest.mark.parametrize(
    ("before_step", "told_of", "place"),
    [(-1, "not ready for the first step", "(sleepy_make)"), (0, "no first step", "(sleepy_take)")],
)
def test_a_rank_that_hangs_before_the_first_step_is_named(text_dataset, tmp_path, before_step, told_of, place):
    told = hung_run(tmp_path, before_step, *arguments(text_dataset, tmp_path / "run", "guard.start_seconds=10"))
    assert f"error: {told_of} for 10 s; if nothing hangs, raise guard.start_seconds" in told
    assert place in told


@pytest.mark.parametrize("ds_config", ["zero2", "zero3_experts"])
def test_when_a_rank_is_killed_the_others_say_so_and_end(text_dataset, tmp_path, ds_config):
    """With a status that has the run started again, and no pages of where they were."""
    options = arguments(text_dataset, tmp_path / "run", "schedule.steps=100000", ds_config=ds_config)
    with Ranks(2, train_loudly, str(tmp_path / "errors"), *options) as ranks:
        wait_for_steps(tmp_path / "run", 3)
        ranks.processes[1].kill()
        assert ranks.result(0) == EXIT_SEPARATED
    told = (tmp_path / "errors-0").read_text()
    assert "error on rank 0: another rank is gone; see what that one tells, here or on its node" in told
    assert "Traceback" not in told


def train_loudly(errors: str, *options: str | Path) -> int:
    with open(f"{errors}-{os.environ['RANK']}", "w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        return train(*options)


def train_poisoned(steps: list[int], what: str, *options: str | Path) -> int:
    """At some steps rank 1 computes a loss, or a gradient, that is no number or far too large."""
    from mdseq.diffusion.objective import DiffusionObjective

    forward = DiffusionObjective.forward

    def poisoned(self, batch):
        loss = forward(self, batch)
        if batch.step in steps and os.environ["RANK"] == "1":
            factor = {"nan": torch.nan, "inf": torch.inf, "spike": 1000.0}[what]
            return loss * factor
        return loss

    DiffusionObjective.forward = poisoned
    return train(*options)


@pytest.mark.parametrize("ds_config", ["zero2", "zero3_experts"])
@pytest.mark.parametrize("what", ["nan", "inf", "spike"])
def test_a_bad_step_is_skipped_by_all_ranks_and_leaves_no_trace(text_dataset, tmp_path, ds_config, what):
    """The weights after it are those before it, and the steps that follow are sound."""
    common = ("schedule.steps=26", "checkpoint.interval_steps=1", "checkpoint.keep_last=30")
    options = arguments(text_dataset, tmp_path / "run", *common, ds_config=ds_config)
    assert run_ranks(2, train_poisoned, [23], what, *options) == [0, 0]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    assert 24 not in lines  # nothing to report of it
    assert [lines[step]["skipped_steps"] for step in (23, 25)] == [0, 1]
    assert all(torch.isfinite(losses(tmp_path / "run")))
    for which in ("weights", "average", "exp_avg", "exp_avg_sq"):
        before, after, later = (state(tmp_path / "run", step, which) for step in (23, 24, 25))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not all(torch.equal(after[name], later[name]) for name in before)


def test_divergence_stops_the_run_with_a_status_of_its_own(text_dataset, tmp_path):
    more = ("schedule.steps=100", "guard.max_skipped=3", "checkpoint.interval_steps=4")
    options = arguments(text_dataset, tmp_path / "run", *more)
    assert run_ranks(2, train_poisoned, list(range(6, 100)), "nan", *options) == [3, 3]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6
