"""Run a training command again when it crashes: `python -m launcher.supervise [options] -- COMMAND ...`.

The command continues its run, as training commands do (`--resume auto`). It is started again after a wait, but not when
it has crashed several times without a new checkpoint in between, or has ended for a reason that another start would not
change: a mistake, divergence, memory, a failed preflight, or a signal.

In a Slurm job, `--requeue SECONDS` goes on in another job: Slurm sends SIGUSR1 so long before the time limit, the run
saves, and the job is put into the queue again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.run import EXIT_DIVERGED, EXIT_OUT_OF_MEMORY, EXIT_PREFLIGHT_FAILED, EXIT_USER_ERROR
from mdseq.train.signals import STOP_SIGNALS, stop_status

LAST_SECONDS = 30.0  # before the time limit, when a run that has not saved by then is ended
FINAL = {0, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_OUT_OF_MEMORY, EXIT_PREFLIGHT_FAILED, *map(stop_status, STOP_SIGNALS)}


@dataclass(frozen=True)
class Policy:
    """When to start a command again.

    Attributes:
        restarts: How often, in all.
        fruitless: How often in a row without a new checkpoint.
        wait_seconds: Before a restart; twice as long for each time in a row without a new checkpoint.
        longest_wait_seconds: And no longer.
    """

    restarts: int
    fruitless: int
    wait_seconds: float
    longest_wait_seconds: float


class Supervisor:
    """Starts the command, waits for it, and decides.

    Args:
        command: What to run.
        run: The run folder, in which progress shows as new checkpoints.
        policy: When to start it again.
        sleep: Waits; returns early once a signal has asked to stop.
    """

    def __init__(self, command: Sequence[str], run: Path, policy: Policy, sleep: Callable[[float], object]) -> None:
        self.command = command
        self.run_folder = run
        self.policy = policy
        self.stopped_by = 0
        self._sleep = sleep
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """The exit status of the last time."""
        policy, restarts, fruitless = self.policy, 0, 0
        while True:
            before = self.newest_checkpoint()
            self._process = subprocess.Popen(self.command)
            status = self._process.wait()
            if status in FINAL or self.stopped_by:
                return status
            fruitless = 0 if self.newest_checkpoint() > before else fruitless + 1
            reason = f"the command ended with status {status}"
            if fruitless > policy.fruitless:
                _tell(f"{reason}, {fruitless} times in a row without a new checkpoint: giving up")
                return status
            if restarts == policy.restarts:
                _tell(f"{reason}, and has been restarted {restarts} times: giving up")
                return status
            restarts += 1
            wait = min(policy.wait_seconds * 2**fruitless, policy.longest_wait_seconds)
            _tell(f"{reason}; restart {restarts} of {policy.restarts} in {wait:g} s")
            self._sleep(wait)
            if self.stopped_by:
                return stop_status(self.stopped_by)

    def pass_on(self, number: int, _: object) -> None:
        """A signal that asks to stop goes to the command, which saves."""
        self.stopped_by = self.stopped_by or number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def newest_checkpoint(self) -> str:
        """Its name; empty if there is none."""
        return max((path.name for path in (self.run_folder / "checkpoints").glob("step-????????")), default="")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder: the command's --output")
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help="in all; default 10")
    parser.add_argument(
        "--fruitless", type=int, default=2, metavar="N", help="in a row without a new checkpoint; default 2"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="before a restart; twice as long for each time in a row without a new checkpoint; default 10",
    )
    parser.add_argument("--longest_wait", type=float, default=600.0, metavar="SECONDS", help="default 600")
    parser.add_argument(
        "--requeue",
        type=float,
        metavar="SECONDS",
        help="Slurm sends SIGUSR1 so long before the time limit: save, and queue the job again",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --: what to run, with its arguments")
    options = parser.parse_args(arguments)
    if shutil.which(options.command[0]) is None:
        _tell(f"error: no program {options.command[0]}; give what to run after --, as in a shell")
        return EXIT_USER_ERROR
    over = threading.Event()
    policy = Policy(options.restarts, options.fruitless, options.wait, options.longest_wait)
    supervisor = Supervisor(options.command, options.run, policy, over.wait)

    def stop(number: int, frame: FrameType | None) -> None:
        first = not over.is_set()
        supervisor.pass_on(number, frame)
        over.set()
        if first and number == signal.SIGUSR1 and options.requeue is not None:
            patience = threading.Timer(options.requeue - LAST_SECONDS, supervisor.pass_on, (signal.SIGTERM, None))
            patience.daemon = True
            patience.start()

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    before = supervisor.newest_checkpoint()
    status = supervisor.run()
    if status and options.requeue is not None and supervisor.stopped_by == signal.SIGUSR1:
        return _queue_again(status, progress=supervisor.newest_checkpoint() > before)
    return status


def _queue_again(status: int, progress: bool) -> int:
    """Put this Slurm job into the queue again, which ends it; returns the exit status if it cannot be."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not progress:
        _tell("no checkpoint was saved within the time limit: not queued again; raise cluster.time_minutes")
        return status
    _tell(f"saved before the time limit; job {job} is queued again")
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if answer.returncode:
        _tell(f"Slurm refuses to queue job {job} again: {answer.stderr.strip()}; submit the run again, and it goes on")
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
