"""The status of a run follows its steps and its ranks' heartbeats."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdseq.report.spread import Spread
from mdseq.report.status import WRITTEN_EVERY_SECONDS, RunStatus
from mdseq.train.status import StatusHook
from mdseq.train.watch import Heartbeat


class Run:
    """A status of two ranks, and a clock that is set by hand."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder, self.now = folder, 1000.0
        self.hook = StatusHook(folder, step, steps=100, num_ranks=2, clock=lambda: self.now)

    def step(self, step: int, **state: Any) -> None:
        trainer = {"step": step, "is_last_step": False, "stopped_by": 0, "spread": None} | state
        self.hook.after_step(SimpleNamespace(**trainer))  # type: ignore[arg-type]

    def hear(self, seconds: float, *counts: int | None) -> None:
        """After so long, the ranks' counts; None for one that was never heard."""
        self.now += seconds
        self.hook.hear([None if count is None else Heartbeat(count, 7, "here", False, "n1") for count in counts])

    @property
    def status(self) -> RunStatus:
        status = RunStatus.read(self.folder)
        assert status is not None
        return status


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_it_is_there_before_the_first_step(run: Run) -> None:
    status = run.status
    assert (status.state, status.step, status.steps, status.starts) == ("running", 0, 100, 1)
    assert (status.written, status.steps_per_second) == (1000.0, 0.0)
    assert [rank.host for rank in status.ranks] == ["", ""]


def test_it_is_written_every_few_seconds_and_not_more_often(run: Run) -> None:
    run.step(1)
    run.hear(WRITTEN_EVERY_SECONDS - 1, 1, 1)
    assert run.status.step == 0
    run.hear(1, 2, 2)
    assert run.status.step == 1
    assert run.status.written == run.now


def test_the_rate_is_that_since_the_first_step(run: Run) -> None:
    """Whose own time is start-up."""
    run.now += 50
    run.step(1)
    run.now += 20
    run.step(11)
    run.hear(0, 1, 1)
    assert run.status.steps_per_second == pytest.approx(0.5)


def test_a_rank_whose_count_stands_still_is_silent(run: Run) -> None:
    run.hear(2, 1, 1)
    run.hear(15, 2, 1)
    run.hear(15, 3, 1)
    assert [rank.silent_seconds for rank in run.status.ranks] == [0.0, 30.0]
    assert [(rank.host, rank.step) for rank in run.status.ranks] == [("n1", 7)] * 2


def test_a_rank_that_was_never_heard_is_silent_since_the_start(run: Run) -> None:
    run.hear(40, 1, None)
    assert [rank.silent_seconds for rank in run.status.ranks] == [0.0, 40.0]
    assert run.status.ranks[1].host == ""


def test_the_newest_spread_is_kept(run: Run) -> None:
    spreads = [Spread(0.2, own_seconds, 0.0, 0.5, 1, "n2") for own_seconds in (0.3, 0.4)]
    for step, spread in enumerate([None, *spreads, None]):
        run.step(step, spread=spread)
    run.hook.close()
    assert run.status.spread == spreads[1]


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"is_last_step": True}, "finished"),
        ({"is_last_step": True, "stopped_by": 15}, "stopped"),
        ({}, "failed"),
    ],
)
def test_how_it_ends(run: Run, last: dict[str, Any], state: str) -> None:
    run.step(5, **last)
    run.hook.close()
    assert (run.status.state, run.status.step) == (state, 5)


def test_each_start_is_counted(run: Run) -> None:
    run.hook.close()
    assert Run(run.folder, step=5).status.starts == 2
    (run.folder / "status.json").write_text("damaged")
    assert Run(run.folder).status.starts == 1


def test_a_full_disk_stops_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mdseq.report.status.write_whole", full)
    run.hear(WRITTEN_EVERY_SECONDS, 1, 1)
    run.hook.close()


def test_the_job_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert Run(tmp_path).status.job == "4711"
