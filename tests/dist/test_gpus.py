"""Two GPUs over NCCL: the losses of one, however a run is spread; moves between one and two; a rank that is killed.

`PYTORCH_NVML_BASED_CUDA_CHECK=1 pytest tests/dist/test_gpus.py`: ranks are forked, so nothing may start CUDA before.

In bf16, the order of sums grows into a difference of losses, the faster the higher the learning rate: at ten times the
one here, two ranks on a CPU differ from one by 2e-3 after 24 steps.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from mdseq.engine.checkpoint import whole_checkpoints
from mdseq.report.metrics import read_metrics
from mdseq.train.watch import EXIT_HUNG
from tests.dist.ranks import Ranks, run_ranks, train
from tests.dist.test_elastic import spread
from tests.dist.test_stragglers import SLOW_SECONDS, USUAL_SECONDS, told, train_unevenly
from tests.dist.test_training import TINY, losses

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

STEPS = 24
WAYS = [(2, "zero3", 2), (2, "zero2", 2), (2, "zero3", None)]


def arguments(
    dataset: Path, folder: Path, num_ranks: int, ds_config: str, experts_over: int | None, *more: str
) -> list[str | Path]:
    path = folder.with_name(f"{folder.name}-{num_ranks}-{ds_config}-{experts_over}.json")
    path.write_text(json.dumps(spread(ds_config, experts_over)))
    return [
        "--ds_config", path, "--data", dataset, "--output", folder, *TINY, "model.hidden_dim=128",
        "optimiser.precision=bf16", "optimiser.learning_rate=3e-4", f"schedule.steps={STEPS}",
        "schedule.decay=constant", f"data.micro_batch_size={4 // num_ranks}", "checkpoint.interval_steps=4",
        "checkpoint.keep_last=100000", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_gpu(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run_ranks(1, train, *arguments(text_dataset, folder, 1, "zero2", None)) == [0]
    return folder


@pytest.mark.parametrize(("num_ranks", "ds_config", "experts_over"), WAYS)
def test_losses_are_those_of_one_gpu(one_gpu, text_dataset, tmp_path, num_ranks, ds_config, experts_over):
    folder = tmp_path / "run"
    statuses = run_ranks(2, train, *arguments(text_dataset, folder, num_ranks, ds_config, experts_over))
    assert statuses == [0, 0]
    difference = (losses(folder) / losses(one_gpu) - 1).abs().max().item()
    print(f"{num_ranks} GPUs, {ds_config}, experts over {experts_over}: losses differ by {difference:.1e} at most")
    assert difference < 1e-3


@pytest.mark.parametrize(("num_ranks", "ds_config", "experts_over"), WAYS)
@pytest.mark.parametrize("where", ["gpu", "forward"])
def test_the_gpu_that_the_other_waits_for_is_named(text_dataset, tmp_path, where, num_ranks, ds_config, experts_over):
    """Be it that the GPU is slow, or the process that feeds it."""
    options = arguments(text_dataset, tmp_path / "run", num_ranks, ds_config, experts_over)
    assert run_ranks(2, train_unevenly, where, 1, str(tmp_path / "printed"), *options) == [0, 0]
    late = read_metrics(tmp_path / "run")[4:]
    slowest, usual = (median(line[f"own_seconds_{name}"] for line in late) for name in ("slowest", "median"))
    print(f"{ds_config}, slow in its {where}: {slowest:.3f} s, for {usual:.3f}")
    assert {line["slowest_rank"] for line in late} == {1}
    assert slowest - usual == pytest.approx(SLOW_SECONDS - USUAL_SECONDS, rel=0.1)
    assert slowest > SLOW_SECONDS
    assert len(told(tmp_path)) == 1


def test_a_run_that_moves_from_two_to_one_and_back(one_gpu, text_dataset, tmp_path):
    folder = tmp_path / "run"
    for steps, way in ((8, (2, "zero3", 2)), (16, (1, "zero2", None)), (STEPS, (2, "zero2", 2))):
        given = arguments(text_dataset, folder, *way, f"schedule.steps={steps}")
        assert run_ranks(way[0], train, *given) == [0] * way[0]
    assert len(losses(folder)) == STEPS
    difference = (losses(folder) / losses(one_gpu) - 1).abs().max().item()
    print(f"2 to 1 to 2 GPUs: losses differ by {difference:.1e} at most")
    assert difference < 1e-3


def test_a_killed_rank_ends_the_run_which_then_goes_on(one_gpu, text_dataset, tmp_path):
    """The other rank waits in a collective on the GPU, notices that the first is gone, and ends."""
    folder, way = tmp_path / "run", (2, "zero3", 2)
    slow = arguments(text_dataset, folder, *way, "guard.hang_seconds=5", "schedule.steps=100000")
    with Ranks(2, train, *slow) as ranks:
        deadline = time.monotonic() + 120
        while not whole_checkpoints(folder / "checkpoints"):
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.1)
        killed = time.monotonic()
        ranks.processes[1].kill()
        ranks.processes[0].join(60)
        print(f"the other rank ended {time.monotonic() - killed:.0f} s after the kill")
        assert ranks.processes[0].exitcode == EXIT_HUNG
    for path, manifest in whole_checkpoints(folder / "checkpoints"):
        if manifest.step > STEPS - 4:
            shutil.rmtree(path)
    assert run_ranks(2, train, *arguments(text_dataset, folder, *way)) == [0, 0]
    by_step = {line["step"]: line["loss"] for line in read_metrics(folder)}
    assert by_step[STEPS] == pytest.approx(losses(one_gpu)[-1].item(), rel=1e-3)
