"""Crashes are survived, crash loops and ends that are meant are not repeated."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.supervise import FINAL, Policy, Supervisor, main

ROOT = Path(__file__).parents[2]
# Notes each start in a file, then does what its line of the script says: exit statuses, and "+" for a new checkpoint.
COMMAND = """
import sys; from pathlib import Path
run, script = Path(sys.argv[1]), sys.argv[2].split()
log = run / "log"; done = log.read_text().split() if log.exists() else []
act = script[min(len(done), len(script) - 1)]
log.write_text(" ".join([*done, act]))
if "+" in act: (run / "checkpoints" / f"step-{len(done):08d}").mkdir(parents=True)
sys.exit(int(act.strip("+")))
"""


def supervise(folder: Path, script: str, restarts: int = 10, fruitless: int = 2) -> tuple[int, list[str], list[float]]:
    """Status, what the command did, and the waits in between."""
    waits: list[float] = []
    command = [sys.executable, "-c", COMMAND, str(folder), script]
    status = Supervisor(command, folder, Policy(restarts, fruitless, 10, 60), waits.append).run()
    return status, (folder / "log").read_text().split(), waits


def test_a_run_that_crashes_and_gets_on_is_restarted_to_its_end(tmp_path: Path, capsys) -> None:
    assert supervise(tmp_path, "+1 +1 1 +134 0") == (0, ["+1", "+1", "1", "+134", "0"], [10, 10, 20, 10])
    assert "ended with status 134; restart 4 of 10 in 10 s" in capsys.readouterr().err


def test_a_crash_loop_stops(tmp_path: Path, capsys) -> None:
    assert supervise(tmp_path, "+1 1 1 1 0") == (1, ["+1", "1", "1", "1"], [10, 20, 40])
    assert "3 times in a row without a new checkpoint: giving up" in capsys.readouterr().err


def test_waits_double_up_to_the_longest(tmp_path: Path) -> None:
    assert supervise(tmp_path, "1 1 1 1 1 0", fruitless=9)[2] == [20, 40, 60, 60, 60]


def test_restarts_are_bounded(tmp_path: Path) -> None:
    status, acts, _ = supervise(tmp_path, "+1", restarts=3)
    assert (status, len(acts)) == (1, 4)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_an_end_that_another_start_would_not_change_is_the_end(tmp_path: Path, status: int) -> None:
    assert supervise(tmp_path, f"{status} 0") == (status, [str(status)], [])


def test_a_signal_is_passed_on_and_not_answered_with_a_restart(tmp_path: Path) -> None:
    program = "import time, signal, sys, pathlib; signal.signal(15, lambda *_: sys.exit(1)); "
    program += f"pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    command = [sys.executable, "-m", "launcher.supervise", "--run", str(tmp_path), "--", sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1


def test_a_program_that_is_not_there_is_a_mistake(tmp_path: Path, capsys) -> None:
    assert main(["--run", str(tmp_path), "--", "no-such-program"]) == 2
    assert "error: no program no-such-program" in capsys.readouterr().err
