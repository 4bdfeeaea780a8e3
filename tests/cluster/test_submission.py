"""Training under a real Slurm of two nodes: whatever befalls a job, the run ends as one that was left in peace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from launcher import slurm as submission
from mdseq.engine.checkpoint import whole_checkpoints
from mdseq.report.status import RunStatus
from tests.cluster.slurm import Slurm, wait_until
from tests.dist.test_training import DS_CONFIGS, TINY, run, state

# A rank on each of two nodes; a node of the tests has few CPUs, and its ranks tiny tensors.
CLUSTER = [
    "cluster.nodes=2", "cluster.gpus_per_node=0", "cluster.cpus_per_node=1", "cluster.memory_gb_per_node=2",
    "cluster.time_minutes=20", 'cluster.setup=["export OMP_NUM_THREADS=1"]',
]  # fmt: skip
STEPS, LONG = 200, 1500
RUN = ["data.micro_batch_size=2", "report.log_interval_steps=5", "checkpoint.interval_steps=25"]
# Slurm waits before it starts a job again, and each start costs as much as hundreds of steps.
PATIENCE_SECONDS = 240


def submit(
    dataset: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str, steps: int = STEPS
) -> list[str]:
    """Through the command; the numbers of the jobs."""
    arguments = [
        "--ds_config", DS_CONFIGS / "zero3_experts.json", "--data", dataset, "--output", output, *CLUSTER, *TINY, *RUN,
        f"schedule.steps={steps}", *more,
    ]  # fmt: skip
    status = submission.main([str(argument) for argument in arguments])
    printed, complaints = capsys.readouterr()
    assert status == 0, complaints
    return re.findall(r"^job (\d+): ", printed, re.MULTILINE)


def wait_for_checkpoint(folder: Path) -> None:
    wait_until(lambda: bool(whole_checkpoints(folder / "checkpoints")), PATIENCE_SECONDS, f"a checkpoint in {folder}")


def log_of(folder: Path, job: str) -> str:
    return (folder / "slurm" / f"{job}.log").read_text()


def without_slurm(dataset: Path, folder: Path, steps: int = STEPS) -> Path:
    """The same run, left in peace."""
    return run(dataset, folder, 2, "zero3_experts", *RUN, f"schedule.steps={steps}")


@pytest.fixture(scope="module")
def undisturbed(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_slurm(text_dataset, tmp_path_factory.mktemp("calm") / "run")


def assert_ended_like(undisturbed: Path, folder: Path, job: str, steps: int = STEPS) -> None:
    expected = state(undisturbed, steps)
    found = state(folder, steps)
    assert found.keys() == expected.keys()
    different = [name for name, weight in found.items() if not torch.equal(weight, expected[name])]
    assert not different, log_of(folder, job)
    status = RunStatus.read(folder)
    assert status is not None
    assert (status.state, status.job, status.step) == ("finished", job, steps)


def test_a_job_that_is_requeued_goes_on(near: Slurm, text_dataset, tmp_path, capsys, undisturbed) -> None:
    """As on preemption."""
    folder = tmp_path / "run"
    (job,) = submit(text_dataset, folder, capsys)
    wait_for_checkpoint(folder)
    status = RunStatus.read(folder)
    assert status is not None
    assert (status.state, status.job) == ("running", job)
    near.run("scontrol", "requeue", job)
    near.wait_for(job, seconds=PATIENCE_SECONDS)
    assert_ended_like(undisturbed, folder, job)
    status = RunStatus.read(folder)
    assert status is not None
    assert status.starts == 2
    assert f"continuing {folder}/checkpoints/step-" in log_of(folder, job)


@pytest.mark.slow
def test_a_time_limit_is_no_end(near: Slurm, text_dataset, tmp_path, capsys) -> None:
    """Slurm's own signal, a minute before its limit: saved, queued again, and so on until all steps are taken."""
    folder = tmp_path / "run"
    (job,) = submit(text_dataset, folder, capsys, "cluster.time_minutes=2", "cluster.save_seconds=60", steps=LONG)
    near.wait_for(job, seconds=540)
    log = log_of(folder, job)
    assert f"saved before the time limit; job {job} is queued again" in log
    assert_ended_like(without_slurm(text_dataset, tmp_path / "calm", LONG), folder, job, LONG)
    status = RunStatus.read(folder)
    assert status is not None
    assert status.starts == 1 + log.count("is queued again")


@pytest.mark.slow
def test_a_node_that_dies_takes_the_run_with_it_but_not_its_steps(
    near: Slurm, text_dataset, tmp_path, capsys, undisturbed
) -> None:
    folder = tmp_path / "run"
    (job,) = submit(text_dataset, folder, capsys)
    wait_for_checkpoint(folder)
    near.kill_node("n2")
    wait_until(lambda: near.job_states(job) == {job: "PENDING"}, 90, "the job queued again")
    near.start_node("n2")
    near.wait_for(job, seconds=PATIENCE_SECONDS)
    assert_ended_like(undisturbed, folder, job)


def test_a_cancelled_job_leaves_a_whole_checkpoint(near: Slurm, text_dataset, tmp_path, capsys, undisturbed) -> None:
    """And what is submitted anew goes on from there; the node's copy of the dataset is as good as the dataset."""
    folder = tmp_path / "run"
    (job,) = submit(text_dataset, folder, capsys)
    wait_for_checkpoint(folder)
    near.run("scancel", job)
    near.wait_for(job, "CANCELLED", seconds=60)
    (_, manifest) = whole_checkpoints(folder / "checkpoints")[-1]
    assert manifest.step < STEPS
    (again,) = submit(
        text_dataset, folder, capsys, f"cluster.scratch={tmp_path}/on ${{SLURMD_NODENAME}}", "cluster.preflight=true"
    )
    near.wait_for(again, seconds=PATIENCE_SECONDS)
    assert_ended_like(undisturbed, folder, again)
    assert "preflight passed" in log_of(folder, again)
    copies = [path for node in ("n1", "n2") for path in (tmp_path / f"on {node}").glob("mdseq-*/*/manifest.json")]
    assert len(copies) == 2


def test_a_chain_of_a_build_an_array_of_runs_and_their_evaluation(near: Slurm, tmp_path, capsys) -> None:
    """With names that a careless shell would carry out."""
    place = tmp_path / """it's "the" $(touch mischief) & `touch mischief`"""
    place.mkdir()
    texts = [f"River {number} runs past mill {number % 7} and its grey cats.\n" * 20 for number in range(60)]
    (place / "a file.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = place / "prep.toml"
    source.write_text("sources = [{ path = 'a file.jsonl' }]\nvocabulary.size = 512\nsplits.valid_fraction = 0.2\n")
    jobs = submit(
        place / "data", place / "runs", capsys, "--prep", str(source), "--evaluate", "seed=0,1", "cluster.nodes=1",
        "data.micro_batch_size=4", steps=5,
    )  # fmt: skip
    assert len(jobs) == 3
    for job in jobs:
        near.wait_for(job, seconds=PATIENCE_SECONDS)
    for seed in (0, 1):
        folder = place / "runs" / f"seed={seed}"
        (figures,) = folder.glob("likelihood-*.json")
        assert json.loads(figures.read_text())["step"] == 5
        assert f"seed = {seed}" in (folder / "spec.toml").read_text()
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["slurm"]["SLURM_ARRAY_TASK_ID"] == str(seed)
    assert not list(tmp_path.rglob("mischief"))
    assert not Path("mischief").exists()
