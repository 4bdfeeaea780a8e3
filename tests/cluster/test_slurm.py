"""The cluster that the other tests stand on is a real one, and leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm import Slurm, processes_that_know, wait_until

ROOT = Path(__file__).parents[2]


def test_srun_reaches_both_nodes(slurm: Slurm) -> None:
    names = slurm.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME")
    assert sorted(names.split()) == ["n1", "n2"]


def test_an_array_runs_to_its_end(slurm: Slurm) -> None:
    job = slurm.sbatch("echo $SLURM_ARRAY_TASK_ID", "--array=0-3", "--output=array-%a.txt")
    slurm.wait_for(job)
    assert [(slurm.folder / f"array-{task}.txt").read_text() for task in range(4)] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_killed_node_takes_its_tasks_along_and_comes_back(slurm: Slurm) -> None:
    job = slurm.sbatch("touch running; sleep 300; touch survived", "--nodelist=n2", "--no-requeue")
    wait_until((slurm.folder / "running").exists, 20, "a job on n2")
    before = len(processes_that_know(slurm.folder))
    slurm.kill_node("n2")
    assert len(processes_that_know(slurm.folder)) < before - 2  # the daemon, the job's script, and what it runs
    slurm.start_node("n2")
    slurm.run("scancel", job)
    assert slurm.run("srun", "--nodelist=n2", "printenv", "SLURMD_NODENAME") == "n2"


def test_nothing_outlives_the_process_that_started_it(slurm: Slurm) -> None:
    program = (
        "import os, signal; from tests.cluster.slurm import Slurm; cluster = Slurm().__enter__()\n"
        "cluster.sbatch('touch started; sleep 300', '--chdir', str(cluster.folder))\n"
        "print(cluster.folder, flush=True)\n"
        "while not (cluster.folder / 'started').exists(): pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    folder = Path(printed.strip())
    assert folder.is_dir()
    wait_until(lambda: not processes_that_know(folder), 5, "no process left")
    shutil.rmtree(folder)
