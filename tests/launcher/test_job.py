"""The job scripts, as `--print` shows them: see tests/launcher/golden/.

After a change that is meant: `python -m tests.launcher.test_job` writes them anew; read the difference.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.job import Job, Training, evaluation_job, preparation_job, training_job
from launcher.sweep import Sweep
from mdseq.spec import ClusterSpec

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"

HOSTILE = """it's "ours" $(touch mischief) `touch mischief`; touch mischief
touch mischief #"""


def training(*overrides: str, output: str = "runs/novels", data: str = "data/novels", spec: str = "moe") -> Training:
    return Training(
        ds_config=Path("ds_configs/zero3_experts.json"),
        spec=Path(spec),
        data=Path(data),
        output=Path(output),
        resume="auto",
        allow_changes=False,
        sweep=Sweep.of(overrides),
    )


GPUS = ClusterSpec(nodes=4, partition="h100", account="books", time_minutes=1200)
EVERYTHING = ClusterSpec(
    nodes=2,
    gpus_per_node=4,
    cpus_per_node=32,
    memory_gb_per_node=512,
    qos="high",
    cpu_partition="cpu",
    options=("--constraint=a100&ib", "--exclude=n13"),
    setup=("module load cuda/12.8", 'export NCCL_DEBUG="WARN"'),
    network="ib0",
    scratch="$TMPDIR",
    container="registry#team/mdseq:1.0",
    container_mounts=("/models",),
    preflight=True,
    restarts=0,
    save_seconds=120,
)
JOBS: dict[str, Job] = {
    "gpus": training_job(training("schedule.steps=5000"), GPUS),
    "cpus": training_job(training(), ClusterSpec(gpus_per_node=0, ranks_per_node=4)),
    "everything": training_job(training(), EVERYTHING),
    "apptainer": training_job(
        training(), ClusterSpec(container="mdseq.sif", container_runtime="apptainer", container_mounts=("/models",))
    ),
    "array": training_job(training("seed=0,1", "optimiser.learning_rate=1e-4,3e-4", "schedule.steps=9"), GPUS),
    "prep": preparation_job(Path("my documents"), training(), EVERYTHING),
    "evaluate": evaluation_job(training(), GPUS),
    "evaluate_array": evaluation_job(training("seed=0,1"), GPUS),
}


def portable(script: str) -> str:
    """Without what differs from checkout to checkout."""
    names = {shlex.quote(sys.executable): "PYTHON", str(ROOT): "CHECKOUT"}
    for found, name in {**names, str(Path.cwd()): "CHECKOUT"}.items():
        script = script.replace(found, name)
    return script


@pytest.mark.parametrize("name", JOBS)
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert portable(JOBS[name].script()) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_bash_can_read_it(name: str) -> None:
    assert subprocess.run(["bash", "-n"], input=JOBS[name].script(), text=True, check=False).returncode == 0


def carried_out(job: Job, folder: Path) -> list[list[str]]:
    """What a job starts, each as its arguments, when bash runs it with programs that only note what they are given."""
    programs = folder / "programs"
    programs.mkdir()
    called = shlex.quote(str(folder / "called"))
    note = f'#!/bin/bash\nprintf "%s\\0" "$@" >> {called}; printf "\\1" >> {called}\n'
    for program in ("srun", "python"):
        (programs / program).write_text(note)
        (programs / program).chmod(0o755)
    (programs / "scontrol").write_text("#!/bin/bash\necho n1; echo n2\n")
    (programs / "scontrol").chmod(0o755)
    script = job.script().replace(f"exec {shlex.quote(sys.executable)} ", "exec python ")
    script = script.replace(f"cd -- {shlex.quote(str(Path.cwd()))}", f"cd -- {shlex.quote(str(folder))}")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_ON_NODE": "8"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment, cwd=folder)
    calls = (folder / "called").read_text().split("\1")[:-1]
    return [call.split("\0")[:-1] for call in calls]


def test_what_a_user_calls_things_is_never_carried_out(tmp_path: Path) -> None:
    plain = HOSTILE.replace("\n", " ")  # an output folder with a line break is refused when it is submitted
    hostile = training(f"data.path={HOSTILE}", f"checkpoint.x={HOSTILE}", output=plain, data=HOSTILE, spec=HOSTILE)
    cluster = ClusterSpec(
        container=HOSTILE, container_mounts=(HOSTILE,), scratch=HOSTILE, preflight=True, gpus_per_node=1
    )
    jobs = {
        "train": training_job(hostile, cluster),
        "prep": preparation_job(Path(HOSTILE), hostile, cluster),
        "evaluate": evaluation_job(hostile, cluster),
    }
    for name, job in jobs.items():
        folder = tmp_path / name
        folder.mkdir()
        calls = carried_out(job, folder)
        assert sorted(path.name for path in folder.iterdir()) == ["called", "programs"]
        assert any(HOSTILE in argument for call in calls for argument in call)


def test_the_training_gets_its_arguments_as_they_were(tmp_path: Path) -> None:
    job = training_job(training(f"data.path={HOSTILE}", output="my runs/it's", spec="my spec.toml"), GPUS)
    (call,) = carried_out(job, tmp_path)
    assert call[: call.index("--")] == [
        "-m", "launcher.supervise", "--restarts", "3", "--run", "my runs/it's", "--requeue", "300",
    ]  # fmt: skip
    assert call[call.index(str(ROOT / "launcher/run.py")) + 1 :] == [
        "--ds_config", "ds_configs/zero3_experts.json", "--spec", "my spec.toml", "--output", "my runs/it's",
        f"data.path={HOSTILE}",
    ]  # fmt: skip


def test_a_task_of_an_array_gets_its_own_run(tmp_path: Path) -> None:
    (call,) = carried_out(training_job(training("seed=3,4"), GPUS), tmp_path)
    assert call[call.index("--run") + 1] == "runs/novels/seed=4"
    assert call[-3:] == ["--output", "runs/novels/seed=4", "seed=4"]


if __name__ == "__main__":
    os.chdir(ROOT)
    for name, job in JOBS.items():
        (GOLDEN / f"{name}.sh").write_text(portable(job.script()))
