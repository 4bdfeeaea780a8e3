"""What the objective reports of itself: means over micro-batches, and over the documents of each noise level."""

from __future__ import annotations

import pytest
import torch

from mdseq.diffusion.statistics import NUM_NOISE_LEVELS, PARTS, LossStatistics


def add_documents(statistics: LossStatistics, timesteps: list[float], losses: list[float]) -> None:
    counted = torch.ones(len(losses), 1, dtype=torch.bool)
    statistics.add_documents(torch.tensor(timesteps, dtype=torch.float64)[:, None], torch.tensor([losses]).T, counted)


def test_parts_are_means_over_micro_batches_and_0_where_the_loss_has_none() -> None:
    statistics = LossStatistics(num_timesteps=20)
    statistics.add(torch.tensor(3.0), {"denoising": torch.tensor(1.0), "anchor": torch.tensor(2.0)})
    statistics.add(torch.tensor(5.0), {"denoising": torch.tensor(3.0), "anchor": torch.tensor(2.0)})
    expected = {"loss": 4.0, "denoising": 2.0, "anchor": 2.0, "rounding": 0.0, "balance": 0.0, "router_z": 0.0}
    assert set(expected) == set(PARTS)
    assert statistics.take() == expected


def test_taking_starts_anew() -> None:
    statistics = LossStatistics(num_timesteps=20)
    for loss in (1.0, 7.0):
        statistics.add(torch.tensor(loss), {})
        add_documents(statistics, [3], [loss])
        taken = statistics.take()
        assert (taken["loss"], taken["noise_level_1"]) == (loss, loss)


@pytest.mark.parametrize("num_timesteps", [10, 20, 2000])
def test_each_noise_level_is_a_tenth_of_the_timesteps(num_timesteps: int) -> None:
    """Whole or not; the first and the last included."""
    for level in range(NUM_NOISE_LEVELS):
        statistics = LossStatistics(num_timesteps)
        statistics.add(torch.tensor(1.0), {})
        first, beyond = level * num_timesteps // 10, (level + 1) * num_timesteps // 10
        between = [first + 0.5] if first + 0.5 <= num_timesteps - 1 else []
        timesteps = [float(first), beyond - 1.0, *between]
        add_documents(statistics, timesteps, [float(k) for k in range(len(timesteps))])
        levels = {name: mean for name, mean in statistics.take().items() if name.startswith("noise_level")}
        assert levels == {f"noise_level_{level}": pytest.approx((len(timesteps) - 1) / 2)}


def test_documents_without_targets_do_not_count() -> None:
    statistics = LossStatistics(num_timesteps=10)
    statistics.add(torch.tensor(1.0), {})
    timesteps, losses = torch.tensor([[1, 1], [1, 4]]), torch.tensor([[2.0, 9.0], [4.0, 9.0]])
    statistics.add_documents(timesteps, losses, torch.tensor([[True, False], [True, False]]))
    taken = statistics.take()
    assert taken["noise_level_1"] == 3.0
    assert "noise_level_4" not in taken


def test_tallies_of_ranks_add_up() -> None:
    whole, first, second = (LossStatistics(num_timesteps=10) for _ in range(3))
    for rank, loss in ((first, 2.0), (second, 6.0)):
        for statistics in (rank, whole):
            statistics.add(torch.tensor(loss), {"rounding": torch.tensor(loss / 2)})
            add_documents(statistics, [0, loss], [loss, 1.0])
    first.tally += second.tally  # as the all-reduce does
    assert first.take() == whole.take()


def test_nothing_of_the_graph_is_kept() -> None:
    statistics, loss = LossStatistics(num_timesteps=10), torch.ones((), requires_grad=True)
    statistics.add(loss * 2, {"anchor": loss * 3})
    assert not statistics.tally.requires_grad
