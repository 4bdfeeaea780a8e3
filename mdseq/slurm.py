"""What is asked of Slurm, by whatever submits jobs to it: data preparation and training."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mdseq.errors import UserError

# What launcher/node.py tells the ranks: the names of the run's nodes, with commas, and what only this start is called.
NODES_VARIABLE, START_VARIABLE = "MDSEQ_NODES", "MDSEQ_START"
JOBS_FOLDER = "slurm"  # in a run folder: scripts and logs of the jobs that have trained it

# States of a job that will not run any more.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
ENDED |= {"PREEMPTED", "REVOKED", "FORGOTTEN"}


def require_slurm(otherwise: str) -> None:
    """Raise UserError unless jobs can be submitted from here; `otherwise` says what else the user may do."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "there is no Slurm on this machine (no sbatch and srun in PATH): start the command on a login node of the "
            f"cluster, or {otherwise}"
        )


def require_log_folder(folder: Path) -> None:
    """Raise UserError for a folder whose name Slurm would take for a pattern."""
    if {"%", "\n"} & set(str(folder.absolute())):
        raise UserError(f"Slurm cannot write its logs to {str(folder)!r}: its path must have no % and no line break")


def job_name(name: str) -> str:
    """One word, as Slurm's tables show it best."""
    return re.sub(r"[^\w.-]+", "-", name)


def submission_environment(chosen: Mapping[str, str]) -> dict[str, str]:
    """For sbatch: the environment of this process, less what would change the job.

    A job submitted from within another must inherit nothing of it, nor the user's defaults overrule what was asked for.

    Args:
        chosen: Options of sbatch that are given a value, such as {"partition": "gpu"}.
    """
    defaults = {"SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS"} - {f"SBATCH_{key.upper()}" for key in chosen}
    kept = {"SLURM_CONF", *defaults}
    return {
        key: value
        for key, value in os.environ.items()
        if key in kept or not key.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_"))
    }


def import_line() -> str:
    """Shell line for a checkout that is not installed: the folder of our packages goes first, as it does here."""
    root = Path(__file__).resolve().parents[1]
    return f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def job_states(job: str) -> dict[str, str] | None:
    """State of a job, or of several (commas between), or of each task of an array ("7_0"), by number.

    None when Slurm does not answer. It forgets a job some minutes after its end, which is not in the answer then.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--jobs", job]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired:
        return None
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        return None
    return dict(line.split() for line in answer.stdout.splitlines())
