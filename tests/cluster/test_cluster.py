"""Job arrays on a real Slurm: where tasks run, how they fail, and how they are called off."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_prep import cluster
from data_prep.cluster import run_on_slurm
from data_prep.spec import ClusterSpec
from mdseq.errors import UserError
from tests.cluster import tasks
from tests.cluster.slurm import Slurm, wait_until

ROOT = Path(__file__).parents[2]
SMALL = ClusterSpec(memory_gb=0.5, time_minutes=10)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_QUESTIONS", 0.5)
    monkeypatch.setattr(cluster, "GRACE_SECONDS", 2.0)


def run(function: Callable[[int], None], folder: Path, num_tasks: int = 4, spec: ClusterSpec = SMALL) -> None:
    run_on_slurm(function, num_tasks, spec, folder / "array", "prep of 'a b'", while_waiting=lambda: None)


def squeue_complains(complaint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\necho '{complaint}' >&2; exit 1\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def all_ended(slurm: Slurm) -> bool:
    return set(slurm.job_states().values()) <= cluster.ENDED


def test_tasks_run_on_all_nodes_in_the_place_of_the_caller(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / """it's "our" $(touch mischief) folder; exit"""
    folder.mkdir()
    monkeypatch.chdir(folder)
    calls: list[int] = []
    run_on_slurm(partial(tasks.tell_where, folder, 4), 4, SMALL, Path("logs"), "prep", lambda: calls.append(0))
    told = [(folder / f"{number}").read_text().splitlines() for number in range(4)]
    assert sorted(node for node, *_ in told) == ["n1", "n1", "n2", "n2"]
    assert {tuple(place) for _, *place in told} == {(str(folder), sys.executable)}
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2", "3", "logs"]
    assert len(calls) > 1
    printed, complaints = capfd.readouterr()
    assert re.fullmatch(r"Slurm job \d+: 4 tasks; `squeue --jobs \d+` lists them; logs in .*\n", printed)
    assert not complaints  # such as those about the missing sacct


def test_one_task_is_no_array_and_runs_all_the_same(near: Slurm, tmp_path: Path) -> None:
    run(partial(tasks.tell_where, tmp_path, 1), tmp_path, num_tasks=1)
    assert (tmp_path / "0").exists()


def test_setup_lines_are_run_first_and_the_job_around_us_is_not_inherited(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a job leaves in the environment; srun refuses more than one kind of memory limit.
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "overruled")
    monkeypatch.setenv("SBATCH_ACCOUNT", "kept")
    setup = ("export NAME='dear \"user\"'", 'export GREETING="hello, $NAME"')
    spec = SMALL.model_copy(update={"setup": setup, "partition": "main"})
    run(partial(tasks.tell_where, tmp_path, 2), tmp_path, 2, spec)
    assert (tmp_path / "1").read_text().splitlines()[-1] == 'hello, dear "user"'
    assert "Account=kept" in near.run("scontrol", "show", "jobs", "--oneliner")


def test_a_mistake_of_the_user_ends_the_array_with_one_message(near: Slurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^row 7 of 'a.csv' is too long; raise the limit\n\(task 1 of .*\)$"):
        run(tasks.make_a_mistake, tmp_path)
    assert all_ended(near)


def test_a_bug_is_reported_by_its_message_and_its_traceback_is_in_the_log(near: Slurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ZeroDivisionError") as error:
        run(tasks.divide_by_zero, tmp_path, num_tasks=2)
    assert "Traceback" not in str(error.value)
    log = re.search(r"log in (.*?log\.out)", str(error.value))
    assert log is not None
    assert "in divide_by_zero" in Path(log[1]).read_text()


def test_a_function_that_the_nodes_cannot_import_is_reported(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def work(number): ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"(?s)could not start.*No module named 'only_here'"):
        run(importlib.import_module("only_here").work, tmp_path, num_tasks=1)


def test_a_task_that_vanishes_is_named_when_the_others_have_ended(near: Slurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 4 tasks") as error:
        run(partial(tasks.die, tmp_path, 2), tmp_path)
    assert re.search(
        r"(?s)task 2: FAILED.*_2_0_log.out:.*reading the last file.*same command goes on", str(error.value)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "3", "array"]


def test_a_task_that_slurm_has_forgotten_is_noticed(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As minutes after its end.
    squeue_complains("slurm_load_jobs error: Invalid job id specified", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="task 0: FORGOTTEN"):
        run(partial(tasks.die, tmp_path, 0), tmp_path, num_tasks=1)


def test_a_controller_that_does_not_answer_says_nothing_about_tasks(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GRACE_SECONDS", 0.0)
    squeue_complains("slurm_load_jobs error: Unable to contact slurm controller", tmp_path, monkeypatch)
    run(partial(tasks.tell_where, tmp_path, 1), tmp_path, num_tasks=1)


@pytest.mark.slow  # Slurm waits before it starts a job again
def test_tasks_whose_time_runs_out_are_called_again(near: Slurm, tmp_path: Path) -> None:
    warned: list[str] = []

    def warn_once() -> None:  # as Slurm does before the time limit
        if not warned and (tmp_path / "0").exists() and (tmp_path / "1").exists():
            warned.extend(job for job, state in near.job_states().items() if state == "RUNNING")
            near.run("scancel", "--signal=USR2", *warned)

    run_on_slurm(partial(tasks.end_the_second_time, tmp_path), 2, SMALL, tmp_path / "array", "prep", warn_once)
    assert len(warned) == 2
    assert (tmp_path / "0 again").exists()
    assert (tmp_path / "1 again").exists()


@pytest.mark.slow  # Slurm takes its time to give a node up
def test_a_task_whose_node_dies_is_called_again(near: Slurm, tmp_path: Path) -> None:
    killed: list[str] = []

    def kill_once() -> None:
        if not killed and (tmp_path / "0").exists():
            killed.append(near.run("squeue", "--noheader", "--states=running", "--format=%N"))
            near.kill_node(killed[0])

    run_on_slurm(partial(tasks.end_the_second_time, tmp_path), 1, SMALL, tmp_path / "array", "prep", kill_once)
    assert (tmp_path / "0 again").exists()


def test_ctrl_c_cancels_the_array(near: Slurm, tmp_path: Path) -> None:
    program = (
        "import signal, sys; from functools import partial; from pathlib import Path; from data_prep.cluster import *\n"
        "from tests.cluster.tasks import last_long; folder = Path(sys.argv[1])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "run_on_slurm(partial(last_long, folder), 4, ClusterSpec(), folder / 'array', 'prep', lambda: None)"
    )
    command = [sys.executable, "-c", program, tmp_path]
    child = subprocess.Popen(command, cwd=ROOT, env=near.environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: all((tmp_path / f"{task}").exists() for task in range(4)), 30, "four running tasks")
        child.send_signal(signal.SIGINT)
        complaints = child.communicate(timeout=30)[1]
    finally:
        child.kill()
    assert child.returncode == -signal.SIGINT
    assert re.search(r"Slurm job \d+ is cancelled; the same command goes on where it stopped", complaints)
    assert all_ended(near)


@pytest.mark.parametrize("deaf", [1, 10**6])
def test_a_controller_that_does_not_hear_is_told_again(
    near: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deaf: int
) -> None:
    scancel = shutil.which("scancel")
    (tmp_path / "scancel").write_text(
        f'#!/bin/sh\ncd {tmp_path}; echo x >> calls; [ $(wc -l < calls) -gt {deaf} ] || exit 1; exec {scancel} "$@"\n'
    )
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def interrupt() -> None:
        if (tmp_path / "0").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_slurm(partial(tasks.last_long, tmp_path), 1, SMALL, tmp_path / "array", "prep", interrupt)
    told = capsys.readouterr().err
    if deaf == 1:
        assert "is cancelled" in told
        assert all_ended(near)
    else:
        job = re.search(r"Slurm job (\d+) still runs: scancel \1", told)
        assert job is not None
        near.run(str(scancel), job[1])


def test_a_job_that_slurm_refuses(near: Slurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)refused.*invalid partition specified: nonesuch"):
        run(tasks.make_a_mistake, tmp_path, spec=SMALL.model_copy(update={"partition": "nonesuch"}))


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        run(tasks.make_a_mistake, tmp_path)
    assert not (tmp_path / "array").exists()


def test_a_folder_that_slurm_cannot_log_to(near: Slurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no % and no line break"):
        run(tasks.make_a_mistake, tmp_path / "100%j")
