"""Training on real ranks: the same curve however it is spread, and exactly the same after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mdseq.engine.partitions import MOMENTS
from mdseq.model.pieces import PiecedWeights
from mdseq.model.saved import RANK_FILES
from mdseq.report.metrics import read_metrics
from tests.dist.ranks import run_ranks, train

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"

# Few timesteps, so that the importance sampling of timesteps is at work within the first steps.
TINY = [
    "model.embedding_dim=16", "model.hidden_dim=32", "model.num_layers=2", "model.num_heads=2",
    "attention.window=8", "attention.dilation=[1,2]", "attention.num_global=2",
    "experts.num_experts=4", "experts.feedforward_dim=32",
    "diffusion.num_timesteps=4", "data.row_length=64", "data.batch_size=4",
    "optimiser.learning_rate=3e-3", "optimiser.weight_decay=0.1", "optimiser.ema_decay=0.9",
    "schedule.steps=20", "schedule.warmup_steps=2",
    "report.log_interval_steps=1", "report.sample_interval_steps=0",
]  # fmt: skip


def run(
    dataset: Path, output: Path, num_ranks: int, ds_config: str, *overrides: str, options: tuple[str, ...] = ()
) -> Path:
    """Train the tiny model; returns the run folder."""
    statuses = run_ranks(
        num_ranks, train, "--ds_config", DS_CONFIGS / f"{ds_config}.json", "--data", dataset, "--output", output,
        *options, *TINY, *overrides,
    )  # fmt: skip
    assert statuses == [0] * num_ranks
    return output


def losses(run_folder: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(run_folder)], dtype=torch.float64)


def state(run_folder: Path, step: int, which: str = "average") -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint: "weights", their "average", or one of Adam's moments."""
    with PiecedWeights(sorted((run_folder / "checkpoints" / f"step-{step:08d}").glob(RANK_FILES))) as saved:
        return {name: saved.whole(which, name, shape) for name, shape in saved.shapes().items()}


@pytest.fixture(scope="module")
def one_rank(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others must equal: one rank, experts in plain PyTorch, no sharding to speak of."""
    return run(text_dataset, tmp_path_factory.mktemp("one") / "run", 1, "cpu", "data.micro_batch_size=4")


@pytest.mark.parametrize(
    ("num_ranks", "ds_config", "micro_batch_size"),
    [
        (1, "cpu", 1),
        (2, "cpu", 2),
        (2, "zero2", 1),
        (2, "zero3", 2),
        (2, "zero3_offload", 2),
        (1, "zero3_experts", 2),
        (2, "zero3_experts", 2),
        (2, "zero3_experts", 1),
        (4, "zero3_experts", 1),
    ],
)
def test_every_way_to_spread_a_run_gives_the_same_losses_and_weights(
    one_rank, text_dataset, tmp_path, num_ranks, ds_config, micro_batch_size
):
    other = run(text_dataset, tmp_path / "run", num_ranks, ds_config, f"data.micro_batch_size={micro_batch_size}")
    torch.testing.assert_close(losses(other), losses(one_rank), rtol=1e-5, atol=1e-5)
    expected = state(one_rank, 20)
    for name, weight in state(other, 20).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_experts_on_two_ranks_equal_experts_on_one(text_dataset, tmp_path):
    """EP=2, adopted by AutoEP, against our own layer."""
    spread = run(text_dataset, tmp_path / "ep2", 2, "zero3_experts", "data.micro_batch_size=2")
    ep1 = tmp_path / "ep1.json"
    ep1.write_text((DS_CONFIGS / "zero3_experts.json").read_text().replace('"autoep_size": "auto"', '"autoep_size": 1'))
    statuses = run_ranks(
        2, train, "--ds_config", ep1, "--data", text_dataset, "--output", tmp_path / "ep1", *TINY,
        "data.micro_batch_size=2",
    )  # fmt: skip
    assert statuses == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "ep1"), losses(spread), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_ranks", "ds_config"), [(1, "cpu"), (2, "zero2"), (2, "zero3_experts")])
def test_a_resumed_run_equals_one_run_bit_for_bit(text_dataset, tmp_path, num_ranks, ds_config):
    every_4 = ("data.micro_batch_size=1", "schedule.steps=8", "checkpoint.interval_steps=4")
    whole = run(text_dataset, tmp_path / "whole", num_ranks, ds_config, *every_4)
    stopped = tmp_path / "stopped"  # as if killed between the checkpoints
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")

    run(text_dataset, stopped, num_ranks, ds_config, *every_4)
    assert read_metrics(stopped)[-1]["step"] == 8
    assert [line["step"] for line in read_metrics(stopped)] == list(range(1, 9))
    assert torch.equal(losses(stopped), losses(whole))
    for which in ("weights", "average", *MOMENTS):
        expected = state(whole, 8, which)
        for name, values in state(stopped, 8, which).items():
            assert torch.equal(values, expected[name]), f"{which} of {name}"


def test_pairs_train_in_bf16_and_show_samples(pair_dataset, tmp_path):
    folder = run(
        pair_dataset, tmp_path / "run", 2, "zero3_experts", "data.packing=whole", "data.micro_batch_size=2",
        "optimiser.precision=bf16", "diffusion.num_timesteps=50", "schedule.steps=3",
        "report.sample_interval_steps=3", "report.sample_length=16",
    )  # fmt: skip
    assert torch.isfinite(losses(folder)).all()
    sample = (folder / "samples" / "step-00000003.txt").read_text()
    assert sample.count("--- source: ") == 2


def test_a_model_of_absorbed_tokens_writes_its_samples_by_mask_predict(text_dataset: Path, tmp_path: Path) -> None:
    """Other solvers begin with what it has never seen, and are refused."""
    uniform = ["diffusion.gamma=1", "diffusion.absorbing_schedule=uniform", "diffusion.min_signal=0.3"]
    samples = ["report.sample_interval_steps=2", "report.sample_length=8", "report.sample_solver_steps=3"]
    more = ["data.micro_batch_size=4", "schedule.steps=2", "diffusion.noise_factor=1"]
    folder = run(text_dataset, tmp_path / "run", 1, "cpu", *more, *uniform, *samples)
    assert (folder / "samples" / "step-00000002.txt").read_text().count("--- source") == 2
