"""A function of a task's number as a job array of Slurm, through submitit.

The machine that submits and the nodes share a file system and nothing else: what a task makes it leaves in files, and a
file says how it ended. The queue is asked only about tasks that left none, so no accounting (sacct) is needed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.spec import ClusterSpec
from mdseq.errors import UserError

if TYPE_CHECKING:
    import submitit
    from submitit.core.utils import DelayedSubmission

SECONDS_BETWEEN_LOOKS = 1.0  # at the files that tasks leave
SECONDS_BETWEEN_QUESTIONS = 15.0  # to Slurm, which many users ask
GRACE_SECONDS = 30.0  # a network file system may show a file late
MAX_TIMEOUTS = 10  # of one task, in which it is queued again
LOG_LINES = 10
TASKS_IN_MESSAGE = 3

# States of a job that will not run any more.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
ENDED |= {"PREEMPTED", "REVOKED", "FORGOTTEN"}
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
        array.cancel()
        if isinstance(error, KeyboardInterrupt):
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

    def cancel(self) -> None:
        """Cancel what is left, and wait for it to be gone, so that nobody writes behind the caller's back."""
        subprocess.run(["scancel", self.job_id], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < deadline:
            states = self._states()
            if states is not None and set(states.values()) <= ENDED:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)

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
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--jobs", self.job_id]
        try:
            answer = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
            )
        except subprocess.TimeoutExpired:
            return None
        if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
            return None
        listed = dict(line.split() for line in answer.stdout.splitlines())
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
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "there is no Slurm on this machine (no sbatch and srun in PATH): start the command on a login node of the "
            "cluster, or build here without --cluster slurm"
        )
    if {"%", "\n"} & set(str(folder.absolute())):
        raise UserError(f"Slurm cannot write its logs to {str(folder)!r}: its path must have no % and no line break")
    import submitit

    folder.mkdir(parents=True, exist_ok=True)
    # Numbers of jobs come again when a cluster is set up again: old results must not be taken for new ones.
    logs = tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d-%H-%M-%S-"), dir=folder)
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        name=re.sub(r"[^\w.-]+", "-", name),
        timeout_min=cluster.time_minutes,
        mem_gb=cluster.memory_gb,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=1,
        slurm_array_parallelism=num_tasks,
        slurm_setup=[*cluster.setup, _importing_what_we_do()],
        slurm_stderr_to_stdout=True,
        slurm_signal_delay_s=min(90, 15 * cluster.time_minutes),
        slurm_additional_parameters={"requeue": True},
        **{f"slurm_{key}": value for key, value in _chosen(cluster).items()},
    )
    # A job submitted from within another must inherit nothing of it, nor the user's defaults overrule the spec.
    defaults = {"SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS"} - {f"SBATCH_{k.upper()}" for k in _chosen(cluster)}
    kept = {key: value for key, value in os.environ.items() if key in {"SLURM_CONF", *defaults}}
    try:
        with submitit.helpers.clean_env():
            os.environ.update(kept)
            return executor.map_array(_Task(function), range(num_tasks))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm refused the job; see the cluster section of the prep spec:\n{error}") from None


def _chosen(cluster: ClusterSpec) -> dict[str, str]:
    values = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    return {key: value for key, value in values.items() if value}


def _importing_what_we_do() -> str:
    """Shell line for a checkout that is not installed: the folder of our packages goes first, as it does here."""
    root = Path(__file__).resolve().parents[1]
    return f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "  (there is none: the node could not write to it, or the task never started)"
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
