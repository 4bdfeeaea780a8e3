"""A function of a task's number as a job array of Slurm, through submitit.

The machine that submits and the nodes share a file system and nothing else: what a task makes it leaves in files, and a
file says how it ended. The queue is asked only about tasks that left none, so no accounting (sacct) is needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.spec import ClusterSpec
from mdseq.errors import UserError
from mdseq.slurm import (
    ENDED,
    import_line,
    job_name,
    job_states,
    require_log_folder,
    require_slurm,
    submission_environment,
)

if TYPE_CHECKING:
    import submitit
    from submitit.core.utils import DelayedSubmission

SECONDS_BETWEEN_LOOKS = 1.0  # at the files that tasks leave
SECONDS_BETWEEN_QUESTIONS = 15.0  # to Slurm, which many users ask
GRACE_SECONDS = 30.0  # a network file system may show a file late
MAX_TIMEOUTS = 10  # of one task, in which it is queued again
LOG_LINES = 10
TASKS_IN_MESSAGE = 3

GOES_ON = "the same command goes on where it stopped"


def run_on_slurm(
    function: Callable[[int], None],
    num_tasks: int,
    cluster: ClusterSpec,
    folder: Path,
    name: str,
    while_waiting: Callable[[], None],
) -> None:
    """Call `function` with 0 ... num_tasks - 1, each in a task of one job array, and wait for all of them.

    Tasks run in the working directory, with the interpreter and the modules of the caller. One that is preempted, loses
    its node or runs out of time is called again with the same number. When a task fails, the others are cancelled, for
    they are likely to fail as well; when a task vanishes, the others come to their end first.

    Args:
        function: Picklable and importable on the nodes, and must bear being called again after it was killed.
        num_tasks: At least 1.
        cluster: What each task asks for.
        folder: On a file system that the nodes share; each array has its scripts and logs in a folder of its own here.
        name: Of the job, for those who look at the queue.
        while_waiting: Called about once a second.

    Raises:
        UserError: No Slurm here, the job was refused, or a task failed or vanished. No task runs any more.
        KeyboardInterrupt: Passed on when the array is cancelled, as is anything that `while_waiting` raises.
    """
    jobs = _submit(function, num_tasks, cluster, folder, name)
    array = _Array(jobs[0].job_id.partition("_")[0], tuple(jobs), cluster)
    tasks = "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
    print(
        f"Slurm job {array.job_id}: {tasks}; `squeue --jobs {array.job_id}` lists them; logs in {array.logs}",
        flush=True,
    )
    try:
        array.wait(while_waiting)
    except BaseException as error:
        if not array.cancel():
            print(f"Slurm job {array.job_id} still runs: scancel {array.job_id}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            print(f"Slurm job {array.job_id} is cancelled; {GOES_ON}", file=sys.stderr, flush=True)
        raise


@dataclass(frozen=True)
class _Task:
    """What submitit calls in each task."""

    function: Callable[[int], None]

    def __call__(self, number: int) -> str:
        """What went wrong, in words for the user; empty when nothing did."""
        # submitit ignores it, which would make a cancelled task linger until it is killed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            self.function(number)
        except UserError as error:
            return str(error)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        return ""

    def checkpoint(self, number: int) -> DelayedSubmission:
        """Called when time runs out: what to call when the task has been queued again."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self, number)


@dataclass(frozen=True)
class _Array:
    """A submitted array; `jobs` are its tasks by number."""

    job_id: str
    jobs: tuple[submitit.Job[str], ...]
    cluster: ClusterSpec

    @property
    def logs(self) -> Path:
        return self.jobs[0].paths.folder

    def wait(self, while_waiting: Callable[[], None]) -> None:
        """Return when all tasks have ended well; otherwise raise UserError."""
        unfinished = set(range(len(self.jobs)))
        states: dict[int, str] = {}
        ended_at: dict[int, float] = {}
        asked_at = -float("inf")
        while True:
            while_waiting()
            unfinished -= self._finished(unfinished)
            now = time.monotonic()
            if now - asked_at > SECONDS_BETWEEN_QUESTIONS:
                asked_at = now
                states = self._states() or states
                ended = {task for task in unfinished if states.get(task) in ENDED}
                ended_at = {task: ended_at.get(task, now) for task in ended}
            if all(now - ended_at.get(task, now) > GRACE_SECONDS for task in unfinished):
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if unfinished:
            raise UserError(self._vanished(sorted(unfinished), states))

    def cancel(self) -> bool:
        """Cancel what is left, and wait for it to be gone, so that nobody writes behind the caller's back."""
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < deadline:
            # Each time anew: a controller that is busy may not have heard.
            subprocess.run(["scancel", self.job_id], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            states = self._states()
            if states is not None and set(states.values()) <= ENDED:
                return True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    def _finished(self, unfinished: set[int]) -> set[int]:
        """Those that have left their result. Raises UserError when it is a failure."""
        present = set(os.listdir(self.logs))
        finished = {task for task in unfinished if self.jobs[task].paths.result_pickle.name in present}
        failures = {task: failure for task in sorted(finished) if (failure := self._failure(task))}
        if failures:
            task, failure = next(iter(failures.items()))
            others = f"; {len(failures) - 1} others failed as well" if len(failures) > 1 else ""
            raise UserError(
                f"{failure}\n(task {task} of Slurm job {self.job_id}, log in {self.jobs[task].paths.stdout}{others}; "
                f"when this is mended, {GOES_ON})"
            )
        return finished

    def _failure(self, task: int) -> str:
        from submitit.core.utils import UncompletedJobError

        try:
            return self.jobs[task].result()
        except UncompletedJobError:  # before our own function was reached
            return f"a task could not start:\n{_last_lines(self.jobs[task].paths.stdout)}"

    def _states(self) -> dict[int, str] | None:
        """Slurm's state of each task, FORGOTTEN for what it does not list any more; None when it does not answer."""
        listed = job_states(self.job_id)
        if listed is None:
            return None
        return {task: listed.get(job.job_id, "FORGOTTEN") for task, job in enumerate(self.jobs)}

    def _vanished(self, tasks: list[int], states: dict[int, str]) -> str:
        lines = [f"{len(tasks)} of {len(self.jobs)} tasks of Slurm job {self.job_id} ended without a result:"]
        for task in tasks[:TASKS_IN_MESSAGE]:
            log = self.jobs[task].paths.stdout
            lines.append(f"task {task}: {states[task]}; the end of its log {log}:\n{_last_lines(log)}")
        if len(tasks) > TASKS_IN_MESSAGE:
            lines.append(f"the others: {', '.join(str(task) for task in tasks[TASKS_IN_MESSAGE:])}")
        lines.append(
            f"if memory ran out, raise cluster.memory_gb (now {self.cluster.memory_gb:g}); if a command was not found, "
            f"set it up by cluster.setup; {GOES_ON}"
        )
        return "\n".join(lines)


def _submit(
    function: Callable[[int], None], num_tasks: int, cluster: ClusterSpec, folder: Path, name: str
) -> Sequence[submitit.Job[str]]:
    require_slurm("build here without --cluster slurm")
    require_log_folder(folder)
    import submitit

    folder.mkdir(parents=True, exist_ok=True)
    # Numbers of jobs come again when a cluster is set up again: old results must not be taken for new ones.
    logs = tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d-%H-%M-%S-"), dir=folder)
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        name=job_name(name),
        timeout_min=cluster.time_minutes,
        mem_gb=cluster.memory_gb,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=1,
        slurm_array_parallelism=num_tasks,
        slurm_setup=[*cluster.setup, import_line()],
        slurm_stderr_to_stdout=True,
        slurm_signal_delay_s=min(90, 15 * cluster.time_minutes),
        slurm_additional_parameters={"requeue": True},
        **{f"slurm_{key}": value for key, value in cluster.named().items()},
    )
    try:
        with _environment(submission_environment(cluster.named())):
            return executor.map_array(_Task(function), range(num_tasks))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm refused the job; see the cluster section of the prep spec:\n{error}") from None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Inside, this process has these variables and no others, for it is the one that submits."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "  (there is none: the node could not write to it, or the task never started)"
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
