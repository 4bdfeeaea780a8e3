"""Of ranks that wait for each other, the one that does not wait is the one to name."""

from __future__ import annotations

from mdseq.train.watch import Heartbeat, hang_report

WAITING = Heartbeat(5, 7, "/site-packages/torch/distributed/distributed_c10d.py:1 (all_reduce)", True, "n1")
BUSY = Heartbeat(5, 7, "/mine/loader.py:12 (read)", False, "n1")


def later(beat: Heartbeat) -> Heartbeat:
    return Heartbeat(beat.count + 3, beat.step, beat.place, beat.waits, beat.host)


def test_a_rank_that_is_stopped_or_was_never_heard_of() -> None:
    report = hang_report("no step for 30 s", [WAITING, WAITING, None], [later(WAITING), WAITING, None])
    assert report.splitlines() == [
        "error: no step for 30 s",
        "  rank 1 on n1 gives no sign of life",
        "  rank 2 gives no sign of life",
    ]


def test_a_rank_that_is_busy_with_something_else() -> None:
    report = hang_report("no step for 30 s", [WAITING, BUSY], [later(WAITING), later(BUSY)])
    assert report.splitlines()[1:] == [
        "  rank 1 on n1 is not waiting for the others: it is at /mine/loader.py:12 (read)"
    ]


def test_when_all_wait_all_are_told_of() -> None:
    report = hang_report("no step for 30 s", [WAITING, WAITING], [later(WAITING), later(WAITING)])
    assert [line.split(" is at ")[0] for line in report.splitlines()[1:]] == ["  rank 0 on n1", "  rank 1 on n1"]
