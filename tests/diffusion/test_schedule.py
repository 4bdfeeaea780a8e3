"""The sqrt schedule has DiffuSeq's numbers (method.md 3.3)."""

from __future__ import annotations

import pytest
import torch

from mdseq.diffusion.schedule import NoiseSchedule


def test_the_published_numbers() -> None:
    schedule = NoiseSchedule(2000)
    assert schedule.beta_t[0].item() == pytest.approx(0.01464, abs=5e-6)
    _, sigma = schedule.alpha_sigma(torch.tensor(0))
    assert sigma.item() == pytest.approx(0.121, abs=5e-4)
    for quarter, signal in ((1, 0.504), (2, 0.295), (3, 0.135)):
        assert schedule.alpha_bar_t[quarter * 500].item() == pytest.approx(signal, abs=1e-3)


@pytest.mark.parametrize("num_timesteps", [2, 10, 2000])
def test_closed_form(num_timesteps: int) -> None:
    """abar_t = (1 - sqrt((t + 1) / T + 1e-4)) / 0.99, up to the last step, whose beta is cut at 0.999."""
    schedule = NoiseSchedule(num_timesteps)
    t = torch.arange(num_timesteps - 1, dtype=torch.float64)
    expected = (1 - ((t + 1) / num_timesteps + 1e-4).sqrt()) / 0.99
    torch.testing.assert_close(schedule.alpha_bar_t[:-1], expected, rtol=1e-10, atol=0)
    assert schedule.beta_t[-1] == 0.999
    last = schedule.alpha_bar_t[-1] / schedule.alpha_bar_t[-2]
    assert last.item() == pytest.approx(0.001)


def test_signal_falls_and_noise_rises() -> None:
    schedule = NoiseSchedule(2000)
    assert (schedule.alpha_bar_t.diff() < 0).all()
    assert ((schedule.beta_t > 0) & (schedule.beta_t <= 0.999)).all()
    alpha, sigma = schedule.alpha_sigma(torch.arange(2000))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2000))
    assert alpha[-1] < 1e-3


def test_values_come_in_the_shape_of_the_timesteps() -> None:
    schedule = NoiseSchedule(20)
    timestep = torch.randint(20, (2, 3, 4))
    alpha, sigma = schedule.alpha_sigma(timestep)
    assert alpha.shape == sigma.shape == timestep.shape
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.double(), schedule.alpha_bar_t[timestep].sqrt(), rtol=1e-6, atol=0)
    assert schedule.alpha_sigma(torch.tensor(3))[0].shape == ()


@pytest.mark.parametrize("num_timesteps", [20, 2000])
def test_the_denoiser_is_told_a_time_that_does_not_depend_on_the_number_of_steps(num_timesteps: int) -> None:
    time = NoiseSchedule(num_timesteps).time(torch.tensor([0, num_timesteps // 2, num_timesteps]))
    assert time.tolist() == [0.0, 500.0, 1000.0]
