"""Timesteps spread over the global batch, and timesteps between the whole ones, change no expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.diffusion.timesteps import TimestepSampler
from mdseq.noise import NoiseKey
from tests.diffusion.test_timesteps import draw, sampler_of, warm_sampler
from tests.test_noise import kolmogorov_smirnov

LOSSES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]
T = len(LOSSES)


def positions(documents: int, step: int = 0, seed: int = 0) -> Tensor:
    """Where in (0, 1] each document of a stratified batch stands: T - 1 = 1, so that t is this number itself."""
    timesteps, _ = draw(sampler_of(2, False, stratified=True, continuous_time=True), documents, step=step, seed=seed)
    return timesteps.flatten()


def everything_of(sampler: TimestepSampler, documents: int, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps and weights, [steps, documents]."""
    draws = [draw(sampler, documents, step=step) for step in range(steps)]
    return torch.cat([t.T for t, _ in draws]), torch.cat([weight.T for _, weight in draws])


@settings(max_examples=100)
@given(st.integers(1, 600), st.integers(0, 10**6), st.integers(0, 2**32 - 1))
def test_exactly_one_document_stands_in_each_nth(documents: int, step: int, seed: int) -> None:
    place_n = (positions(documents, step, seed) * documents).ceil().long() - 1
    assert sorted(place_n.tolist()) == list(range(documents))


@pytest.mark.parametrize(("at_least", "distance"), [(2, 0.16), (7, 0.2), (30, 0.3)])
def test_neighbours_stand_apart(at_least: int, distance: float) -> None:
    """Of the next document, the larger the batch the nearer to 1 - 1 / 1.618 = 0.38."""
    for documents in range(at_least, at_least + 60):
        position_n = positions(documents)
        apart_n = (position_n - position_n.roll(1)).abs()[1:]
        assert torch.minimum(apart_n, 1 - apart_n).min() > distance


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 1000), st.data())
def test_the_spread_of_rows_over_micro_batches_does_not_matter(
    counts: list[int], step: int, data: st.DataObject
) -> None:
    """Any rows, in any company, of a global batch of rows with so many documents."""
    row_b, count_b = torch.arange(len(counts)) * 7 + 3, torch.tensor(counts)
    first_b = count_b.cumsum(0) - count_b
    sampler = sampler_of(40, loss_aware=False, stratified=True)
    whole, _ = sampler.draw(NoiseKey(1, step, row_b), max(counts), first_b, sum(counts))
    order = data.draw(st.permutations(range(len(counts))))
    size = data.draw(st.integers(1, len(counts)))
    for begin in range(0, len(order), size):
        index = torch.tensor(order[begin : begin + size])
        most = int(count_b[index].max())
        part, _ = sampler.draw(NoiseKey(1, step, row_b[index]), most, first_b[index], sum(counts))
        for place, b in enumerate(index.tolist()):
            assert torch.equal(part[place, : counts[b]], whole[b, : counts[b]])
    strata = torch.cat([whole[b, : counts[b]] for b in range(len(counts))])
    assert len(strata.unique()) == len(strata), "no two alike, with as many timesteps as documents or more"


def test_every_timestep_comes_as_often_as_every_other_in_one_batch() -> None:
    timesteps, _ = draw(sampler_of(T, False, stratified=True), 4 * T)
    assert np.bincount(timesteps.flatten().long()).tolist() == [4] * T


def test_each_document_is_uniform_over_the_steps() -> None:
    position_sn = torch.stack([positions(11, step) for step in range(1500)])
    for position_s in position_sn.T:
        assert kolmogorov_smirnov(position_s, position_s.sort().values) < 1.95


def test_steps_and_seeds_shift_the_lattice() -> None:
    assert len({positions(5, step)[0].item() for step in range(50)}) == 50
    assert positions(5, seed=1)[0] != positions(5)[0]


@pytest.mark.parametrize("continuous_time", [False, True])
@pytest.mark.parametrize("loss_aware", [False, True])
def test_the_weighted_mean_loss_is_unbiased_and_varies_less(loss_aware: bool, continuous_time: bool) -> None:
    """For a loss that is smooth in t, and another than the history knows."""

    def mean_losses(stratified: bool) -> Tensor:
        losses = [3.0, 3.0, 2.0, 2.0, 1.0, 1.0] if loss_aware else [1.0] * T
        sampler = warm_sampler(losses, stratified, continuous_time)
        timesteps, weights = everything_of(sampler, documents=16, steps=500)
        return (weights * (1 + timesteps / T) ** 2).mean(dim=1)

    grid_t = torch.arange(T, dtype=torch.float64)
    if continuous_time:
        grid_t = (torch.arange(10_000) + 0.5) / 10_000 * (T - 1)
    expected = (1 + grid_t / T).square().mean().item()
    apart, spread = mean_losses(stratified=False), mean_losses(stratified=True)
    for means_s in (apart, spread):
        assert means_s.mean().item() == pytest.approx(expected, abs=4 * means_s.std().item() / len(means_s) ** 0.5)
    assert spread.std() < 0.5 * apart.std()


@pytest.mark.parametrize("stratified", [False, True])
def test_continuous_time_fills_its_range_evenly(stratified: bool) -> None:
    timesteps, weights = draw(sampler_of(T, False, stratified, continuous_time=True), 20_000)
    assert 0 <= timesteps.min() < 1e-2
    assert T - 1 - 1e-2 < timesteps.max() <= T - 1
    share_n = timesteps.flatten() / (T - 1)
    assert kolmogorov_smirnov(share_n, share_n.sort().values) < 1.95
    assert (weights == 1).all()


@pytest.mark.parametrize("stratified", [False, True])
def test_importance_in_continuous_time_is_that_of_the_tth_of_the_range(stratified: bool) -> None:
    sampler = warm_sampler(LOSSES, stratified, continuous_time=True)
    probability_t = sampler.probabilities()
    timesteps, weights = draw(sampler, 60_000)
    in_bins = timesteps.flatten() / (T - 1) * T
    bin_n = in_bins.floor().clamp(max=T - 1)
    share_t = torch.bincount(bin_n.long(), minlength=T) / len(bin_n)
    assert share_t.tolist() == pytest.approx(probability_t.tolist(), abs=0.008)
    torch.testing.assert_close(weights.flatten().double(), 1 / (T * probability_t[bin_n.long()]), rtol=1e-5, atol=0)
    for t in (0, 1, 2):  # evenly within its bin
        within_n = (in_bins - bin_n)[bin_n == t]
        assert kolmogorov_smirnov(within_n, within_n.sort().values) < 1.95


@pytest.mark.parametrize("num_timesteps", [2, 6, 50])
def test_a_loss_in_continuous_time_goes_into_the_history_of_its_bin(num_timesteps: int) -> None:
    sampler = sampler_of(num_timesteps, continuous_time=True)
    width = (num_timesteps - 1) / num_timesteps
    inside = (torch.arange(num_timesteps)[:, None] + torch.tensor([0.01, 0.5, 0.99])).double() * width
    loss_bm = torch.arange(num_timesteps)[:, None].float().expand(-1, 3)
    sampler.record(inside, loss_bm, torch.ones_like(inside, dtype=torch.bool))
    assert sampler.tally[:, 1].tolist() == [3] * num_timesteps
    assert sampler.tally[:, 0].tolist() == [3.0 * t * t for t in range(num_timesteps)]
    sampler.end_step()
    ends = torch.tensor([[0.0, num_timesteps - 1.0]], dtype=torch.float64)
    sampler.record(ends, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    counts = sampler.tally[:, 1].tolist()
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)


@pytest.mark.parametrize("continuous_time", [False, True])
def test_what_is_drawn_is_recorded_where_it_was_drawn_from(continuous_time: bool) -> None:
    """The bin whose probability the weight was made of."""
    sampler = warm_sampler(LOSSES, stratified=True, continuous_time=continuous_time)
    timesteps, weights = draw(sampler, 500)
    sampler.record(timesteps, weights, torch.ones_like(weights, dtype=torch.bool))
    weight_t = 1 / (T * sampler.probabilities())
    assert (sampler.tally[:, 0] / sampler.tally[:, 1]).tolist() == pytest.approx(weight_t.square().tolist(), rel=1e-5)


@pytest.mark.parametrize("continuous_time", [False, True])
def test_stratified_draws_survive_a_state_round_trip(continuous_time: bool) -> None:
    sampler = warm_sampler(LOSSES, True, continuous_time)
    again = sampler_of(T, True, True, continuous_time)
    assert not torch.equal(draw(again, 40)[0], draw(sampler, 40)[0])
    again.load_state_dict({name: value.clone() for name, value in sampler.state_dict().items()})
    for expected, got in zip(draw(sampler, 40), draw(again, 40), strict=True):
        assert torch.equal(expected, got)


def test_one_document_or_none_in_the_global_batch() -> None:
    sampler = sampler_of(T, False, stratified=True)
    for documents in (0, 1):
        timesteps, _ = sampler.draw(NoiseKey(0, 0, torch.arange(1)), 1, torch.zeros(1, dtype=torch.long), documents)
        assert 0 <= timesteps.item() < T
