"""Timesteps are drawn by importance and spread over the batch, and the expected loss does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.diffusion.timesteps import HISTORY, UNIFORM_SHARE, TimestepSampler
from mdseq.noise import NoiseKey
from mdseq.spec import DiffusionSpec

T = 6
BOTH = pytest.mark.parametrize("stratified", [False, True])


def sampler_of(
    num_timesteps: int = T, loss_aware: bool = True, stratified: bool = False, continuous_time: bool = False
) -> TimestepSampler:
    return TimestepSampler(
        DiffusionSpec(
            num_timesteps=num_timesteps,
            timestep_sampling="loss_aware" if loss_aware else "uniform",
            stratified=stratified,
            continuous_time=continuous_time,
        )
    )


def draw(
    sampler: TimestepSampler, rows: int, num_documents: int = 1, step: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Timesteps and weights of a global batch of rows of equally many documents."""
    key = NoiseKey(seed, step, torch.arange(rows))
    return sampler.draw(key, num_documents, torch.arange(rows) * num_documents, rows * num_documents)


def record(sampler: TimestepSampler, timesteps: list[int], losses: list[float]) -> None:
    """One step whose documents, one a row, had these losses."""
    sampler.record(
        torch.tensor(timesteps)[:, None], torch.tensor(losses)[:, None], torch.ones(len(losses), 1, dtype=bool)
    )
    sampler.end_step()


def warm_sampler(losses: list[float], stratified: bool = False, continuous_time: bool = False) -> TimestepSampler:
    """One that has seen these losses, and nothing else, at each timestep."""
    sampler = sampler_of(len(losses), True, stratified)
    for _ in range(HISTORY):
        record(sampler, list(range(len(losses))), losses)
    sampler.continuous_time = continuous_time
    return sampler


def share_of_draws(sampler: TimestepSampler, rows: int = 20_000) -> np.ndarray:
    timesteps, _ = draw(sampler, rows)
    assert torch.equal(timesteps, timesteps.round()), "whole"
    assert 0 <= timesteps.min() <= timesteps.max() < sampler.num_timesteps
    return np.bincount(timesteps.flatten().long(), minlength=sampler.num_timesteps) / rows


@BOTH
@pytest.mark.parametrize("loss_aware", [False, True])
def test_uniform_without_history(loss_aware: bool, stratified: bool) -> None:
    sampler = sampler_of(T, loss_aware, stratified)
    assert share_of_draws(sampler) == pytest.approx(np.full(T, 1 / T), abs=1e-3 if stratified else 0.015)
    timesteps, weights = draw(sampler, 5, 3)
    assert (timesteps.shape, timesteps.dtype) == ((5, 3), torch.float64)
    assert (weights.shape, weights.dtype) == ((5, 3), torch.float32)
    torch.testing.assert_close(weights, torch.ones(5, 3))


def test_uniform_sampling_keeps_no_history() -> None:
    sampler = sampler_of(loss_aware=False)
    record(sampler, [1], [3.0])
    assert sampler.tally.numel() == 0
    assert all(value.numel() == 0 for value in sampler.state_dict().values())


def test_uniform_until_every_timestep_has_a_full_history() -> None:
    sampler = sampler_of()
    for _ in range(HISTORY + 5):
        record(sampler, list(range(T - 1)), [10.0, *[1.0] * (T - 2)])
    for _ in range(HISTORY - 1):
        record(sampler, [T - 1], [1.0])
    assert sampler.probabilities().tolist() == [1 / T] * T
    record(sampler, [T - 1], [1.0])
    assert sampler.probabilities()[0] > 2 / T


def test_importance_is_the_root_mean_square_of_the_losses_mixed_with_uniform() -> None:
    losses = [4.0, 2.0, 1.0, 0.5, 0.25, 0.0]
    sampler = warm_sampler(losses)
    expected = (1 - UNIFORM_SHARE) * np.array(losses) / sum(losses) + UNIFORM_SHARE / T
    assert UNIFORM_SHARE == 0.001
    assert sampler.probabilities().numpy() == pytest.approx(expected, rel=1e-6)
    assert share_of_draws(sampler) == pytest.approx(expected, abs=0.015)


def test_a_root_mean_square_is_not_a_mean() -> None:
    sampler = sampler_of(2)
    for step in range(HISTORY):
        record(sampler, [0, 1], [2.0, 2.0 * 2**0.5 * (step % 2)])
    assert sampler.probabilities().tolist() == pytest.approx([0.5, 0.5])


losses_of_t = st.lists(st.just(0.0) | st.floats(0.125, 100, width=32), min_size=2, max_size=40).filter(any)


@settings(max_examples=60)
@given(losses_of_t)
def test_the_weights_leave_the_expected_loss_unchanged(losses: list[float]) -> None:
    """sum_t p_t w_t L_t = mean_t L_t, for any losses L and whatever the history says."""
    sampler = warm_sampler(losses)
    probability = sampler.probabilities()
    timesteps, weights = draw(sampler, 200, 2)
    torch.testing.assert_close(weights.double(), 1 / (len(losses) * probability[timesteps.long()]), rtol=1e-6, atol=0)
    weight_t = 1 / (len(losses) * probability)
    generator = torch.Generator().manual_seed(len(losses))
    other_losses = torch.rand(len(losses), generator=generator, dtype=torch.float64)
    assert (probability * weight_t * other_losses).sum().item() == pytest.approx(other_losses.mean().item())
    assert probability.sum().item() == pytest.approx(1)
    assert (probability >= UNIFORM_SHARE / len(losses) * (1 - 1e-9)).all()


class SlowHistory:
    """The rule of `LossSecondMomentResampler` with lists; one entry a step and t, the mean of the squares."""

    def __init__(self) -> None:
        self.kept: list[list[float]] = [[] for _ in range(T)]

    def add_step(self, timesteps: list[int], losses: list[float]) -> None:
        for t in range(T):
            squares = [loss**2 for s, loss in zip(timesteps, losses, strict=True) if s == t]
            if squares:
                self.kept[t] = [*self.kept[t], sum(squares) / len(squares)][-HISTORY:]

    def probabilities(self) -> np.ndarray:
        if any(len(kept) < HISTORY for kept in self.kept):
            return np.full(T, 1 / T)
        importance = np.array([np.sqrt(np.mean(kept)) for kept in self.kept])
        return (1 - 0.001) * importance / importance.sum() + 0.001 / T


steps = st.lists(
    st.lists(st.tuples(st.integers(0, T - 1), st.floats(0.125, 8, width=32)), min_size=1, max_size=8),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25)
@given(steps, st.booleans())
def test_history_against_a_slow_one(steps: list[list[tuple[int, float]]], warm_start: bool) -> None:
    sampler, slow = sampler_of(), SlowHistory()
    if warm_start:
        steps = [[(t, 1.0 + t) for t in range(T)]] * HISTORY + steps
    for step in steps:
        timesteps, losses = (list(values) for values in zip(*step, strict=True))
        record(sampler, timesteps, losses)
        slow.add_step(timesteps, losses)
    assert sampler.num_seen_t.tolist() == [len(kept) for kept in slow.kept]
    for t, kept in enumerate(slow.kept):
        assert sampler.squared_loss_th[t, : len(kept)].tolist() == pytest.approx(kept, rel=1e-5)
    assert sampler.probabilities().numpy() == pytest.approx(slow.probabilities(), rel=1e-5)


def test_micro_batches_and_ranks_only_add_to_the_tally() -> None:
    """Two records and one sum of tallies are one record of everything."""
    whole, first, second = (sampler_of() for _ in range(3))
    timesteps, losses = torch.tensor([[0, 1], [1, 5]]), torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    counted = torch.ones(2, 2, dtype=torch.bool)
    whole.record(timesteps, losses, counted)
    first.record(timesteps[:1], losses[:1], counted[:1])
    second.record(timesteps[1:], losses[1:], counted[1:])
    first.tally += second.tally  # as the all-reduce does
    whole.end_step()
    first.end_step()
    assert torch.equal(whole.squared_loss_th, first.squared_loss_th)
    assert whole.squared_loss_th[1, 0] == (2.0**2 + 4.0**2) / 2


def test_documents_that_do_not_count_leave_no_trace() -> None:
    sampler = sampler_of()
    sampler.record(torch.tensor([[1, 2]]), torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))
    sampler.end_step()
    assert sampler.num_seen_t.tolist() == [0, 1, 0, 0, 0, 0]
    assert sampler.squared_loss_th.sum() == 9.0


def test_state_round_trip() -> None:
    sampler = sampler_of()
    for step in range(25):
        record(sampler, [step % T, (step * 5) % T], [step + 0.5, 1.0])
    again = sampler_of()
    again.load_state_dict({name: value.clone() for name, value in sampler.state_dict().items()})
    for each in (sampler, again):
        record(each, [0, 3], [2.0, 7.0])
    assert torch.equal(sampler.probabilities(), again.probabilities())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in sampler.state_dict().items())


@pytest.mark.parametrize("loss_aware", [False, True])
def test_draws_depend_on_the_key_alone(loss_aware: bool) -> None:
    sampler = warm_sampler([3.0, 1.0, 2.0]) if loss_aware else sampler_of(50, loss_aware=False)
    timesteps, weights = draw(sampler, 8, 3)
    draw(sampler, 100, 2, step=9)  # nothing is consumed
    again, weights_again = draw(sampler, 8, 5)
    assert torch.equal(again[:, :3], timesteps)
    assert torch.equal(weights_again[:, :3], weights)
    alone, _ = sampler.draw(NoiseKey(0, 0, torch.tensor([6])), 3, torch.tensor([18]), 24)
    assert torch.equal(alone[0], timesteps[6])
    assert not torch.equal(draw(sampler, 8, 3, step=1)[0], timesteps)
    assert not torch.equal(draw(sampler, 8, 3, seed=1)[0], timesteps)
