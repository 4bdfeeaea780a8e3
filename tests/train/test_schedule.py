"""The learning rate of every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.spec import OptimiserSpec, ScheduleSpec
from mdseq.train.schedule import learning_rate

PEAK = OptimiserSpec(learning_rate=0.1)


def rates(**schedule: object) -> list[float]:
    spec = ScheduleSpec(**schedule)
    return [learning_rate(step, PEAK, spec) for step in range(spec.steps)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates(steps=10, warmup_steps=4)[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_linear_decay_to_zero() -> None:
    assert rates(steps=5, warmup_steps=0) == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])


def test_decay_to_a_share_of_the_peak() -> None:
    assert rates(steps=5, warmup_steps=0, final_fraction=0.5) == pytest.approx([0.1, 0.09, 0.08, 0.07, 0.06])


def test_cosine_is_half_way_in_the_middle() -> None:
    curve = rates(steps=100, warmup_steps=0, decay="cosine", final_fraction=0.2)
    assert curve[0] == pytest.approx(0.1)
    assert curve[50] == pytest.approx(0.06)
    assert curve[99] == pytest.approx(0.02, abs=1e-4)


def test_constant() -> None:
    assert rates(steps=6, warmup_steps=2, decay="constant") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1])


@settings(max_examples=100)
@given(
    st.integers(1, 200),
    st.integers(0, 250),
    st.sampled_from(["linear", "cosine", "constant"]),
    st.floats(0, 1),
)
def test_it_rises_to_the_peak_then_never_rises_and_is_never_zero(
    steps: int, warmup_steps: int, decay: str, final_fraction: float
) -> None:
    curve = rates(steps=steps, warmup_steps=warmup_steps, decay=decay, final_fraction=final_fraction)
    rising, falling = curve[:warmup_steps], curve[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < rate <= 0.1 * (1 + 1e-12) for rate in curve)
    if falling:
        assert falling[0] == pytest.approx(0.1)
        assert falling[-1] >= 0.1 * final_fraction * (1 - 1e-12)
