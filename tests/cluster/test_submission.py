"""Training under a real Slurm of two nodes: whatever befalls a job, the run ends as one that was left in peace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from launcher import slurm as submission
from mdseq.engine.checkpoint import whole_checkpoints
from tests.cluster.slurm import Slurm, wait_until
from tests.dist.test_training import DS_CONFIGS, TINY, run, state

# A rank on each of two nodes; a node of the tests has few CPUs, and its ranks tiny tensors.
CLUSTER = [
    "cluster.nodes=2", "cluster.gpus_per_node=0", "cluster.cpus_per_node=1", "cluster.memory_gb_per_node=2",
    "cluster.time_minutes=20", 'cluster.setup=["export OMP_NUM_THREADS=1"]',
]  # fmt: skip
STEPS = 200
RUN = [*TINY, "data.micro_batch_size=2", "report.log_interval_steps=5", "checkpoint.interval_steps=25"]


def submit(dataset: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str, steps: int = STEPS) -> str:
    """Through the command; the number of the last job."""
    arguments = [
        "--ds_config", DS_CONFIGS / "zero3_experts.json", "--data", dataset, "--output", output, *CLUSTER, *RUN,
        f"schedule.steps={steps}", *more,
    ]  # fmt: skip
    status = submission.main([str(argument) for argument in arguments])
    printed, complaints = capsys.readouterr()
    assert status == 0, complaints
    return re.findall(r"^job (\d+): ", printed, re.MULTILINE)[-1]


def wait_for_checkpoint(folder: Path, seconds: float = 120) -> int:
    """Of a run; its step."""
    wait_until(lambda: bool(whole_checkpoints(folder / "checkpoints")), seconds, f"a checkpoint in {folder}")
    return whole_checkpoints(folder / "checkpoints")[-1][1].step


def log_of(folder: Path, job: str) -> str:
    return (folder / "slurm" / f"{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(
        text_dataset,
        tmp_path_factory.mktemp("calm") / "run",
        2,
        "zero3_experts",
        *RUN[len(TINY) :],
        f"schedule.steps={STEPS}",
    )


def assert_equal_weights(folder: Path, other: Path) -> None:
    expected = state(other, STEPS)
    for name, weight in state(folder, STEPS).items():
        assert torch.equal(weight, expected[name]), name


def test_a_job_that_is_requeued_goes_on(near: Slurm, text_dataset, tmp_path, capsys, undisturbed) -> None:
    folder = tmp_path / "run"
    job = submit(text_dataset, folder, capsys)
    wait_for_checkpoint(folder)
    near.run("scontrol", "requeue", job)
    try:
        near.wait_for(job, seconds=180)
    finally:
        print(log_of(folder, job))
    assert_equal_weights(folder, undisturbed)
