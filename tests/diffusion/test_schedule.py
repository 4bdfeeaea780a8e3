"""Every schedule has its publication's numbers, and is one map between timesteps and log signal-to-noise ratios.

The published schedules are written out in NumPy as their authors' code has them: DiffuSeq's `betas_for_alpha_bar` and
`get_named_beta_schedule` (gaussian_diffusion.py, branch diffuseq-v2), and improved-diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, alpha_sigma_of
from mdseq.errors import UserError


def betas_for_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float]) -> np.ndarray:
    betas = []
    for i in range(num_timesteps):
        t1, t2 = i / num_timesteps, (i + 1) / num_timesteps
        betas.append(min(1 - alpha_bar(t2) / alpha_bar(t1), 0.999))
    return np.array(betas)


def sqrt_betas(num_timesteps: int) -> np.ndarray:
    return betas_for_alpha_bar(num_timesteps, lambda t: 1 - np.sqrt(t + 0.0001))


def cosine_betas(num_timesteps: int) -> np.ndarray:
    return betas_for_alpha_bar(num_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def linear_betas(num_timesteps: int) -> np.ndarray:
    """Cut as the others are, since few timesteps ask for betas above 1."""
    scale = 1000 / num_timesteps
    return np.minimum(np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64), 0.999)


def warmup_decay_betas(num_timesteps: int) -> np.ndarray:
    steps = max(1, int(0.1 * num_timesteps))
    betas = sqrt_betas(num_timesteps)
    return np.concatenate([betas[:-steps], np.linspace(betas[-steps], 0.0001, steps)])


PUBLISHED = {"sqrt": sqrt_betas, "cosine": cosine_betas, "linear": linear_betas, "warmup_decay": warmup_decay_betas}
SMALL = {name: NoiseSchedule(name, 50) for name in NOISE_SCHEDULES}
FACTORS = [0.25, 1.0, 3.0]

every_schedule = pytest.mark.parametrize("name", NOISE_SCHEDULES)
names = st.sampled_from(list(NOISE_SCHEDULES))


@every_schedule
@pytest.mark.parametrize("num_timesteps", [2, 3, 10, 70, 999, 1000, 2000])
def test_the_betas_are_the_published_ones(name: str, num_timesteps: int) -> None:
    schedule = NoiseSchedule(name, num_timesteps)
    betas = PUBLISHED[name](num_timesteps)
    np.testing.assert_allclose(NOISE_SCHEDULES[name](num_timesteps), betas, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bar_t, np.cumprod(1 - betas), rtol=1e-9)


def test_there_is_no_schedule_that_is_not_compared() -> None:
    assert PUBLISHED.keys() == NOISE_SCHEDULES.keys()


def test_diffuseqs_numbers() -> None:
    """beta_0, sigma_0, and the signal that is left after each quarter of the 2000 steps."""
    schedule = NoiseSchedule("sqrt", 2000)
    assert 1 - schedule.alpha_bar_t[0].item() == pytest.approx(0.01464, abs=5e-6)
    assert schedule.alpha_sigma(torch.tensor(0))[1].item() == pytest.approx(0.121, abs=5e-4)
    for quarter, signal in ((1, 0.504), (2, 0.295), (3, 0.135)):
        assert schedule.alpha_bar_t[quarter * 500].item() == pytest.approx(signal, abs=1e-3)


def test_diffuseqs_schedule_in_closed_form() -> None:
    """abar_t = (1 - sqrt((t + 1) / T + 1e-4)) / 0.99, up to the last step, whose beta is cut."""
    schedule = NoiseSchedule("sqrt", 2000)
    t = torch.arange(1999, dtype=torch.float64)
    expected = (1 - ((t + 1) / 2000 + 1e-4).sqrt()) / 0.99
    torch.testing.assert_close(schedule.alpha_bar_t[:-1], expected, rtol=1e-10, atol=0)
    assert schedule.alpha_bar_t[-1].item() == pytest.approx(0.001 * expected[-1].item(), rel=1e-9)


@every_schedule
def test_noise_grows_with_every_timestep_however_few_there_are(name: str) -> None:
    for num_timesteps in [*range(2, 60), 100, 1000, 4000]:
        assert (NoiseSchedule(name, num_timesteps).log_snr_t.diff() < 0).all()


@every_schedule
@pytest.mark.parametrize("factor", FACTORS)
def test_whole_timesteps_have_exactly_the_tables_values(name: str, factor: float) -> None:
    for num_timesteps in (2, 7, 2000):
        schedule = NoiseSchedule(name, num_timesteps, factor)
        timestep_t = torch.arange(num_timesteps)
        abar_t = schedule.alpha_bar_t
        assert torch.equal(schedule.log_snr(timestep_t), schedule.log_snr_t)
        assert torch.equal(schedule.timestep_of(schedule.log_snr_t), timestep_t.double())
        torch.testing.assert_close(schedule.log_snr_t, (abar_t / (1 - abar_t)).sqrt().log(), rtol=1e-9, atol=1e-12)


@given(names, st.floats(0, 49), st.floats(0, 49))
def test_less_time_is_less_noise_between_timesteps_too(name: str, one: float, other: float) -> None:
    early, late = sorted((one, other))
    schedule = SMALL[name]
    log_snr = schedule.log_snr(torch.tensor([early, late], dtype=torch.float64))
    assert log_snr[0] > log_snr[1] if late - early > 1e-12 else log_snr[0] >= log_snr[1]
    below = math.floor(early)
    table_t = schedule.log_snr_t.tolist()
    expected = np.interp(early, range(50), table_t)
    assert table_t[below] >= log_snr[0].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(names, st.floats(0, 49), st.floats(0.01, 100))
def test_a_timestep_comes_back_from_its_log_snr(name: str, timestep: float, factor: float) -> None:
    schedule = NoiseSchedule(name, 50, factor)
    back = schedule.timestep_of(schedule.log_snr(torch.tensor(timestep, dtype=torch.float64)))
    assert back.item() == pytest.approx(timestep, abs=1e-11)


@given(names, st.floats(0, 1), st.floats(0.01, 100))
def test_a_log_snr_comes_back_from_its_timestep(name: str, share: float, factor: float) -> None:
    schedule = NoiseSchedule(name, 50, factor)
    log_snr = torch.lerp(schedule.log_snr_t[0], schedule.log_snr_t[-1], share)
    assert schedule.log_snr(schedule.timestep_of(log_snr)).item() == pytest.approx(log_snr.item(), abs=1e-11)


@given(names, st.sampled_from(FACTORS), st.floats(0.01, 0.6))
def test_some_signal_is_left_by_the_part_of_the_schedule_that_has_more(name: str, factor: float, share: float) -> None:
    whole = NoiseSchedule(name, 50, factor)
    min_signal = whole.alpha_bar_t[0].sqrt().item() * (1 - share)
    schedule = NoiseSchedule(name, 50, factor, min_signal)
    alpha, _ = alpha_sigma_of(schedule.log_snr_t)
    if alpha_sigma_of(whole.log_snr_t[-1])[0] >= min_signal:
        torch.testing.assert_close(schedule.log_snr_t, whole.log_snr_t, rtol=1e-12, atol=1e-12)
        return
    assert schedule.log_snr_t[0] == whole.log_snr_t[0]
    assert alpha[-1].item() == pytest.approx(min_signal, rel=1e-9)
    step_t = whole.timestep_of(schedule.log_snr_t).diff()
    torch.testing.assert_close(step_t, step_t.mean().expand(49), rtol=1e-6, atol=1e-9)
    assert torch.equal(schedule.log_snr(torch.arange(50)), schedule.log_snr_t)
    told_t, timestep_t = schedule.time(torch.arange(50)), whole.timestep_of(schedule.log_snr_t)
    torch.testing.assert_close(told_t, whole.time(timestep_t), rtol=1e-5, atol=1e-5)


def test_more_signal_than_there_is_cannot_be_left() -> None:
    with pytest.raises(UserError, match=r"min_signal = 0\.9 is more.* leaves 0\.899; give less"):
        NoiseSchedule("sqrt", 2000, 4.0, 0.9)


@every_schedule
@pytest.mark.parametrize("factor", FACTORS)
def test_a_noise_factor_is_noise_so_many_times_as_strong(name: str, factor: float) -> None:
    """z_t = alpha_t z_0 + factor sigma_t eps, scaled back to unit variance, at every timestep and between."""
    plain, strong = NoiseSchedule(name, 50), NoiseSchedule(name, 50, factor)
    timestep_n = torch.linspace(0, 49, 200, dtype=torch.float64)
    signal_n, noise_n = alpha_sigma_of(plain.log_snr(timestep_n))
    noise_n = factor * noise_n
    scale_n = (signal_n.square() + noise_n.square()).sqrt()
    alpha_n, sigma_n = alpha_sigma_of(strong.log_snr(timestep_n))
    torch.testing.assert_close(alpha_n, signal_n / scale_n, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigma_n, noise_n / scale_n, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(strong.log_snr_t, plain.log_snr_t - math.log(factor), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(strong.alpha_bar_t, alpha_sigma_of(strong.log_snr_t)[0].square(), rtol=1e-12, atol=0)


def test_a_noise_factor_of_one_changes_nothing() -> None:
    assert torch.equal(NoiseSchedule("sqrt", 50).log_snr_t, NoiseSchedule("sqrt", 50, 1.0).log_snr_t)


@every_schedule
def test_outside_the_schedule_lies_its_nearer_end(name: str) -> None:
    outside = torch.tensor([100.0, -100.0])
    assert SMALL[name].timestep_of(outside).tolist() == [0, 49]


def test_alpha_and_sigma_come_in_the_shape_of_the_timesteps() -> None:
    schedule = NoiseSchedule("sqrt", 20)
    timestep = torch.rand(2, 3, 4) * 19
    alpha, sigma = schedule.alpha_sigma(timestep)
    assert alpha.shape == sigma.shape == timestep.shape
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2, 3, 4))
    torch.testing.assert_close((alpha / sigma).log(), schedule.log_snr(timestep).float())
    assert schedule.alpha_sigma(torch.tensor(3))[0].shape == ()


@every_schedule
def test_alpha_and_sigma_are_the_tables(name: str) -> None:
    schedule = NoiseSchedule(name, 2000)
    alpha_t, sigma_t = alpha_sigma_of(schedule.log_snr_t)
    torch.testing.assert_close(alpha_t.square(), schedule.alpha_bar_t, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma_t.square() + schedule.alpha_bar_t, torch.ones_like(sigma_t), rtol=4e-16, atol=0)
    torch.testing.assert_close(alpha_t / sigma_t, schedule.log_snr_t.exp(), rtol=1e-12, atol=0)


def test_levels_are_timesteps_in_numbers() -> None:
    schedule = NoiseSchedule("sqrt", 20)
    timesteps = [19.0, 7.25, 0.0]
    for level, timestep in zip(schedule.levels(timesteps), timesteps, strict=True):
        log_snr = schedule.log_snr(torch.tensor(timestep, dtype=torch.float64))
        alpha, sigma = alpha_sigma_of(log_snr)
        assert (level.timestep, level.log_snr) == (timestep, log_snr.item())
        assert (level.alpha, level.sigma) == (alpha.item(), sigma.item())


@pytest.mark.parametrize("num_timesteps", [20, 2000])
def test_the_denoiser_is_told_a_time_that_does_not_depend_on_the_number_of_timesteps(num_timesteps: int) -> None:
    time = NoiseSchedule("sqrt", num_timesteps).time(torch.tensor([0, num_timesteps // 2, num_timesteps]))
    assert time.tolist() == [0.0, 500.0, 1000.0]
