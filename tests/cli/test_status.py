"""What `mdseq status` says of a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mdseq.cli import main
from mdseq.cli.status import describe
from mdseq.report.spread import Spread
from mdseq.report.status import RankStatus, RunStatus

RANKS = (RankStatus(0, "n1", 40, 1.5), RankStatus(1, "n2", 38, 65.0), RankStatus(2, "", 0, 100.0))
STATUS = RunStatus("running", 1000.0, 900.0, 2, "n1", 77, "", 40, 300, 0.5, RANKS)


def rows(run: Path, status: RunStatus = STATUS, now: float = 1005.0) -> dict[str, str]:
    return dict(describe(run, status, now)[::-1])


def test_a_run_that_is_alive(tmp_path: Path) -> None:
    lines = [{"step": 30, "loss": 3.5, "valid_loss": 3.25, "tokens_per_second": 9000.0},
             {"step": 40, "loss": 3.125, "tokens_per_second": 8000.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows(tmp_path)
    assert found["state"] == "running"
    assert found["where"] == "process 77 on n1"
    assert found["started"].endswith(", start 2")
    assert found["step"] == "40 of 300 (13.3%)"
    assert found["loss"] == "3.1250 at step 40, held-out 3.2500 at step 30"
    assert found["rate"] == "0.5 steps/s, 8,000 tokens/s"
    assert found["left"] == "0:08:40"
    assert found["checkpoint"] == "none yet"
    assert found["ranks"] == "1 of 3 heard"
    assert [text for name, text in describe(tmp_path, STATUS, 1005.0) if not name] == [
        "rank 1 on n2: silent for 0:01:05, at step 38",
        "rank 2, never heard: silent for 0:01:40, at step 0",
    ]


def test_a_run_that_is_not_heard_any_more(tmp_path: Path) -> None:
    found = rows(tmp_path, now=1000.0 + 3700)
    assert found["state"] == "no sign of life for 1:01:40: killed, or cut off"
    assert "left" not in found


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_has_ended(tmp_path: Path, state: str) -> None:
    found = rows(tmp_path, replace(STATUS, state=state), now=10_000.0)
    assert found["state"] == state
    assert not found.keys() & {"rate", "left", "loss"}


def test_a_run_of_slurm_names_its_job(tmp_path: Path) -> None:
    assert rows(tmp_path, replace(STATUS, job="4711"))["where"] == "process 77 on n1, Slurm job 4711"


def test_the_slowest_rank_is_shown(tmp_path: Path) -> None:
    assert "slowest" not in rows(tmp_path)
    found = rows(tmp_path, replace(STATUS, spread=Spread(0.25, 0.5, 0.125, 0.6, 1, "n2")))
    assert found["slowest"].startswith("rank 1 on n2 takes 2.0 times as long as the median (own time 0.5 s a step")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(STATUS, state="finished", step=300).write(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "finished" in told
    assert "300 of 300 (100.0%)" in told


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    os.mkdir(tmp_path / "empty")
    assert main(["status", str(tmp_path / name)]) == 2
    assert "holds no run that has begun to train; give the --output of one that has" in capsys.readouterr().err
