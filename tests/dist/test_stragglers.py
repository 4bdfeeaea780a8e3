"""The rank that the others wait for is named, by how much it is slower; measuring changes nothing."""

from __future__ import annotations

import contextlib
import os
import time
from functools import cache
from pathlib import Path
from statistics import median, mode
from unittest.mock import patch

import pytest
import torch

from mdseq.report.metrics import read_metrics
from mdseq.report.status import RunStatus
from tests.dist.ranks import run_ranks
from tests.dist.test_training import DS_CONFIGS, TINY, losses

USUAL_SECONDS, SLOW_SECONDS = 0.1, 0.4


def train_unevenly(where: str, slow_rank: int | None, printed: str, *options: str | Path) -> int:
    """Every rank pauses in its forward pass, on its GPU if asked; the slow one longer, there or in its loader."""
    from launcher.run import main
    from mdseq.data.loader import Loader
    from mdseq.diffusion.objective import DiffusionObjective

    is_slow = int(os.environ["RANK"]) == slow_rank
    forward, read = DiffusionObjective.forward, Loader._read

    def sleepy_forward(self, batch):
        seconds = SLOW_SECONDS if is_slow and where != "loader" else USUAL_SECONDS
        if where == "gpu":
            torch.cuda._sleep(int(seconds * gpu_cycles_a_second()))
        else:
            time.sleep(seconds)
        return forward(self, batch)

    def sleepy_read(self, step):
        time.sleep(SLOW_SECONDS if is_slow and where == "loader" else 0)
        return read(self, step)

    DiffusionObjective.forward, Loader._read = sleepy_forward, sleepy_read
    with open(f"{printed}-{os.environ['RANK']}", "w") as file, contextlib.redirect_stdout(file):
        return main([str(option) for option in options])


@cache
def gpu_cycles_a_second() -> float:
    cycles = 10**8
    torch.cuda._sleep(cycles)  # raises the clock
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return cycles / (time.perf_counter() - started)


def arguments(dataset: Path, folder: Path, ds_config: str, steps: int = 12) -> list[str | Path]:
    return [
        "--ds_config", DS_CONFIGS / f"{ds_config}.json", "--data", dataset, "--output", folder, *TINY,
        "data.micro_batch_size=2", f"schedule.steps={steps}",
    ]  # fmt: skip


def told(folder: Path) -> list[str]:
    """What rank 0 says of stragglers."""
    return [line for line in (folder / "printed-0").read_text().splitlines() if "times as long as the median" in line]


@pytest.mark.parametrize("ds_config", ["zero2", "zero3_experts"])
@pytest.mark.parametrize("where", ["forward", "loader"])
def test_a_slow_rank_is_named(text_dataset, tmp_path, ds_config, where):
    options = arguments(text_dataset, tmp_path / "run", ds_config)
    assert run_ranks(2, train_unevenly, where, 1, str(tmp_path / "printed"), *options) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert "own_seconds_slowest" not in lines[0], "the first step is start-up"
    late = lines[4:]  # the loader reads two steps ahead
    assert all(line["step_seconds"] >= line["own_seconds_slowest"] for line in late)
    typical = {name: median(line[name] for line in late) for name in late[0] if "seconds" in name}
    assert mode(line["slowest_rank"] for line in late) == 1
    assert typical["own_seconds_median"] == pytest.approx(USUAL_SECONDS, abs=0.1)
    assert typical["own_seconds_slowest"] == pytest.approx(SLOW_SECONDS, abs=0.1)
    waited = SLOW_SECONDS - USUAL_SECONDS if where == "loader" else 0.0
    assert typical["data_seconds_slowest"] == pytest.approx(waited, abs=0.1)
    assert told(tmp_path)
    assert all(": rank 1 on " in line for line in told(tmp_path))
    status = RunStatus.read(tmp_path / "run")
    assert status is not None
    assert status.spread is not None
    assert status.spread.metrics().items() <= lines[-1].items()


def test_nothing_is_told_of_equals(text_dataset, tmp_path):
    options = arguments(text_dataset, tmp_path / "run", "zero3_experts")
    assert run_ranks(2, train_unevenly, "forward", None, str(tmp_path / "printed"), *options) == [0, 0]
    assert told(tmp_path) == []
    assert all("own_seconds_median" in line for line in read_metrics(tmp_path / "run")[1:])


def train_with_or_without(measured: bool, *options: str | Path) -> int:
    from tests.dist.ranks import train

    if measured:
        return train(*options)
    with patch("mdseq.engine.waiting.StepClock.step", lambda *_: contextlib.nullcontext()):
        return train(*options)


@pytest.mark.parametrize("ds_config", ["zero2", "zero3_experts"])
def test_measuring_changes_no_bit(text_dataset, tmp_path, ds_config):
    for measured in (True, False):
        options = arguments(text_dataset, tmp_path / str(measured), ds_config)
        assert run_ranks(2, train_with_or_without, measured, *options) == [0, 0]
    measured, plain = (read_metrics(tmp_path / name) for name in ("True", "False"))
    assert "own_seconds_median" in measured[-1]
    assert not any("own_seconds_median" in line for line in plain)
    assert torch.equal(losses(tmp_path / "True"), losses(tmp_path / "False"))


def test_one_rank_has_nobody_to_wait_for(text_dataset, tmp_path):
    assert run_ranks(1, train_with_or_without, True, *arguments(text_dataset, tmp_path / "run", "cpu", 3)) == [0]
    assert not any("own_seconds_median" in line for line in read_metrics(tmp_path / "run"))
