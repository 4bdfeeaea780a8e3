"""A clock measures the steps that it should, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from mdseq.engine.waiting import StepClock


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked() -> list[object]:
    return [vars(dist.Work)["wait"], vars(dist.ProcessGroup)["allreduce"]]


def test_own_time_is_that_of_the_step_less_the_waits(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock(torch.device("cpu"), 1)
    wait = dist.Work.wait
    monkeypatch.setattr(dist.Work, "wait", lambda work: (time.sleep(0.05), wait(work)))
    with clock.step(1):
        pass
    with clock.step(2):
        with clock.data():
            time.sleep(0.02)
        dist.all_reduce(torch.ones(2))
        handle = dist.all_reduce(torch.ones(2), async_op=True)
        time.sleep(0.1)
        handle.wait()
    seconds = clock.take()
    assert seconds is not None
    assert seconds.waiting == pytest.approx(0.1, abs=0.03)
    assert seconds.data == pytest.approx(0.02, abs=0.015)
    assert seconds.own == pytest.approx(0.12, abs=0.03)
    assert clock.take() is None


@pytest.mark.parametrize(("interval_steps", "measured"), [(0, []), (1, [8, 9, 10, 11, 12]), (5, [10])])
def test_every_so_many_steps_are_measured_but_not_the_first(interval_steps: int, measured: list[int]) -> None:
    clock = StepClock(torch.device("cpu"), interval_steps)
    found = []
    for number in range(7, 13):
        with clock.step(number):
            pass
        found += [number] if clock.take() else []
    assert found == measured


def test_torch_is_as_it_was_after_a_measured_step_even_one_that_fails(group: None) -> None:
    before = hooked()
    clock = StepClock(torch.device("cpu"), 1)
    with clock.step(1):
        assert hooked() == before
    with contextlib.suppress(ZeroDivisionError), clock.step(2):
        assert all(now is not then for now, then in zip(hooked(), before, strict=True))
        raise ZeroDivisionError
    assert all(now is then for now, then in zip(hooked(), before, strict=True))
    assert clock.take() is None
