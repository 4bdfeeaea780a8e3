"""What tasks of an array do in the tests; in a file of its own, which the nodes import quickly."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mdseq.errors import UserError
from tests.cluster.slurm import wait_until

FOREVER_SECONDS = 300


def tell_where(folder: Path, num_tasks: int, number: int) -> None:
    """Write where the task runs, and end only when all tasks run at once, so that both nodes are needed."""
    about = (os.environ["SLURMD_NODENAME"], os.getcwd(), sys.executable, os.environ.get("GREETING", ""))
    (folder / f"{number}.tmp").write_text("\n".join(about))
    (folder / f"{number}.tmp").rename(folder / f"{number}")
    wait_until(lambda: all((folder / f"{task}").exists() for task in range(num_tasks)), 60, "all tasks at once")


def make_a_mistake(number: int) -> None:
    """One task finds a mistake of the user, the others would go on for long."""
    if number == 1:
        raise UserError("row 7 of 'a.csv' is too long; raise the limit")
    time.sleep(FOREVER_SECONDS)


def divide_by_zero(number: int) -> None:
    """One task has a bug."""
    print(1 // (number - 1))


def die(folder: Path, doomed: int, number: int) -> None:
    """One task is killed as the kernel does when memory runs out; the others end well, after it."""
    if number == doomed:
        print("reading the last file", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    (folder / f"{number}").touch()


def last_long(folder: Path, number: int) -> None:
    """Say that it has started, and go on for long."""
    (folder / f"{number}").touch()
    time.sleep(FOREVER_SECONDS)


def end_the_second_time(folder: Path, number: int) -> None:
    """Go on for long when called first, and end at once when called again."""
    started = folder / f"{number}"
    if started.exists():
        (folder / f"{number} again").touch()
        return
    started.touch()
    time.sleep(FOREVER_SECONDS)
