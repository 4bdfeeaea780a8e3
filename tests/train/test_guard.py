"""Steps that are better not taken are told from those that are merely large."""

from __future__ import annotations

import math

import pytest

from mdseq.spec import GuardSpec
from mdseq.train.guard import MIN_HISTORY, Guard, TrainingDiverged


def guard_after(*norms: float, **spec: float) -> Guard:
    guard = Guard(GuardSpec(**spec))
    for norm in norms:
        assert guard.allows("loss", 1.0)
        assert guard.allows("gradient norm", norm)
        guard.end_step(taken=True)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "gradient norm"])
def test_what_is_not_finite_is_not_allowed_from_the_start(name: str, value: float) -> None:
    guard = Guard(GuardSpec())
    assert not guard.allows(name, value)
    assert guard.reason == f"its {name} is {value}"


def test_a_spike_is_so_many_times_the_median() -> None:
    guard = guard_after(*[1.0] * 15, *[3.0] * 15, spike_factor=4)
    assert guard.allows("gradient norm", 8.0)
    assert not guard.allows("gradient norm", 8.1)
    assert "its gradient norm is 8.1, 4 times the median" in guard.reason
    assert guard.gradient_norm == 3.0


def test_the_first_steps_and_a_factor_of_zero_know_no_spikes() -> None:
    assert guard_after(*[1.0] * (MIN_HISTORY - 1)).allows("gradient norm", 1e9)
    assert not guard_after(*[1.0] * MIN_HISTORY).allows("gradient norm", 1e9)
    assert guard_after(*[1.0] * 50, spike_factor=0).allows("gradient norm", 1e9)


def test_what_was_not_taken_does_not_count_as_seen() -> None:
    guard = guard_after(*[1.0] * 30, spike_factor=2, max_skipped=100)
    for _ in range(60):
        assert not guard.allows("gradient norm", 5.0)
        guard.end_step(taken=False)
    assert not guard.allows("gradient norm", 5.0)
    assert guard.skipped == 60


def test_too_many_in_a_row_end_the_run_and_others_do_not() -> None:
    guard = Guard(GuardSpec(max_skipped=2))
    for taken in (False, False, True, False, False):
        guard.allows("loss", math.nan)
        guard.end_step(taken)
    guard.allows("loss", math.nan)
    with pytest.raises(TrainingDiverged, match="3 steps in a row could not be taken: of the last, its loss is nan"):
        guard.end_step(taken=False)


def test_a_restored_guard_decides_as_before() -> None:
    guard = guard_after(*[1.0] * 25, spike_factor=2)
    again = Guard(GuardSpec(spike_factor=2))
    again.load_state_dict(guard.state_dict())
    assert [again.allows("gradient norm", norm) for norm in (1.9, 2.1)] == [True, False]
