"""Which ranks are told of as slow, from made-up figures."""

from __future__ import annotations

import pytest

from mdseq.report.spread import Pace, Spread
from mdseq.train.stragglers import Stragglers


def spread(*own_seconds: float) -> Spread:
    """Of ranks that take so long, a tenth of it for data; of which the node's name is the rank's letter."""
    paces = [Pace("abcdefg"[rank], own, own / 10, max(own_seconds)) for rank, own in enumerate(own_seconds)]
    return Spread.of(paces)


def news(*reports: Spread) -> list[int]:
    """At which reports something is told."""
    stragglers = Stragglers()
    return [number for number, report in enumerate(reports) if stragglers.is_news(report)]


def test_the_slowest_rank_is_compared_with_the_median() -> None:
    found = spread(0.2, 0.21, 0.4, 0.22, 0.19)
    assert (found.slowest_rank, found.slowest_host) == (2, "c")
    assert (found.own_seconds_median, found.own_seconds_slowest) == (0.21, 0.4)
    assert found.step_seconds == 0.4
    assert str(found) == (
        "rank 2 on c takes 1.9 times as long as the median (own time 0.4 s a step, median 0.21 s; "
        "0.04 s waiting for data)"
    )


def test_of_two_ranks_one_is_compared_with_the_other() -> None:
    assert spread(0.1, 0.3).factor == pytest.approx(3)


EVEN, SLOW, OTHER = spread(1.0, 1.0, 1.25), spread(1.0, 1.0, 1.5), spread(1.0, 1.5, 1.0)


@pytest.mark.parametrize(
    ("reports", "told_at"),
    [
        ([EVEN] * 5, []),
        ([EVEN, SLOW, EVEN, SLOW, EVEN], []),  # one slow step proves nothing
        ([SLOW, OTHER, SLOW, OTHER], []),
        ([EVEN, SLOW, SLOW, SLOW, SLOW], [2]),
        ([SLOW, SLOW, EVEN, SLOW, SLOW], [1, 4]),
        ([SLOW, SLOW, OTHER, OTHER, OTHER], [1, 3]),
    ],
)
def test_a_slow_rank_is_told_of_in_the_second_report_and_then_when_it_has_changed(
    reports: list[Spread], told_at: list[int]
) -> None:
    assert news(*reports) == told_at
