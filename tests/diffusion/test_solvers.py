"""Solvers against their papers' algorithms, and against a Gaussian, whose denoiser and whose solution are known.

For u_0 ~ N(mu, c^2), u_t ~ N(alpha mu, S^2) with S^2 = alpha^2 c^2 + sigma^2; the best estimate of u_0 is linear in
u_t, and the probability-flow ODE keeps (u_t - alpha mu) / S constant.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.diffusion.schedule import NoiseLevel, NoiseSchedule
from mdseq.diffusion.solvers import SOLVERS, ReverseProcess
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid

MU, C = 1.5, 0.4
SCHEDULE = NoiseSchedule("sqrt", 2000)
DETERMINISTIC = ["ddim", "dpm_2s", "dpm_2m", "dpm_3m"]
STOCHASTIC = ["ddpm", "dpm_2m_sde"]
CALLS = [1, 2, 3, 4, 5, 8, 21]

every_solver = pytest.mark.parametrize("name", SOLVERS)


def levels_between(num_levels: int, noisiest: float = -2.5, cleanest: float = 1.5) -> list[NoiseLevel]:
    """Evenly spaced in lambda."""
    log_snr = torch.linspace(noisiest, cleanest, num_levels, dtype=torch.float64)
    return SCHEDULE.levels(SCHEDULE.timestep_of(log_snr).tolist())


def uneven_levels(num_levels: int) -> list[NoiseLevel]:
    generator = torch.Generator().manual_seed(num_levels)
    timestep = torch.rand(num_levels, dtype=torch.float64, generator=generator) * SCHEDULE.last
    return SCHEDULE.levels(timestep.sort(descending=True).values.tolist())


def no_noise(level: NoiseLevel) -> Tensor:
    raise AssertionError("a deterministic solver asked for noise")


def unchanged(u: Tensor, level: NoiseLevel) -> Tensor:
    return u


def noise_of(levels: list[NoiseLevel], shape: tuple[int, ...]) -> Callable[[NoiseLevel], Tensor]:
    """Other noise at each level, the same whenever it is asked for."""
    draws = {
        level: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        for index, level in enumerate(levels)
    }
    return draws.__getitem__


def solve(
    name: str,
    predict: Callable[[Tensor, NoiseLevel], Tensor],
    u: Tensor,
    levels: list[NoiseLevel],
    draw_normal: Callable[[NoiseLevel], Tensor] = no_noise,
    after_step: Callable[[Tensor, NoiseLevel], Tensor] = unchanged,
) -> Tensor:
    return SOLVERS[name](ReverseProcess(levels, predict, draw_normal, after_step), u)


class Recorder:
    """A denoiser that remembers at which levels it was asked, and about what."""

    def __init__(self, estimate: Callable[[Tensor, NoiseLevel], Tensor]) -> None:
        self.estimate = estimate
        self.levels: list[NoiseLevel] = []
        self.inputs: list[Tensor] = []

    def __call__(self, u: Tensor, level: NoiseLevel) -> Tensor:
        self.levels.append(level)
        self.inputs.append(u)
        return self.estimate(u, level)


def some_estimate(u: Tensor, level: NoiseLevel) -> Tensor:
    """Neither linear in u nor constant in time."""
    return torch.tanh(u) * level.alpha + math.sin(3 * level.log_snr)


class Gaussian:
    """u_0 ~ N(mean, deviation^2)."""

    def __init__(self, mean: float = MU, deviation: float = C) -> None:
        self.mean, self.deviation = mean, deviation

    def spread(self, level: NoiseLevel) -> float:
        return math.hypot(level.alpha * self.deviation, level.sigma)

    def estimate(self, u: Tensor, level: NoiseLevel) -> Tensor:
        """E[u_0 | u]."""
        gain = level.alpha * self.deviation**2 / self.spread(level) ** 2
        return self.mean + gain * (u - level.alpha * self.mean)

    def flow(self, u: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """The exact solution of the ODE at s, from u at t."""
        return s.alpha * self.mean + self.spread(s) * (u - t.alpha * self.mean) / self.spread(t)


# What the papers say, in their symbols. Each gives u at the last level.


def paper_ddim(u: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """DDIM, eq. 12 without noise: the predicted u_0, and the noise that leads from it to u."""
    for t, s in pairwise(levels):
        u_0 = some_estimate(u, t)
        epsilon = (u - t.alpha * u_0) / t.sigma
        u = s.alpha * u_0 + s.sigma * epsilon
    return u


def paper_ddpm(u: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """DDPM, eq. 7, with alpha_bar_t / alpha_bar_s in place of one step's 1 - beta."""
    for t, s in pairwise(levels):
        abar_t, abar_s = t.alpha**2, s.alpha**2
        ratio = abar_t / abar_s
        mean = abar_s**0.5 * (1 - ratio) / (1 - abar_t) * some_estimate(u, t)
        mean = mean + ratio**0.5 * (1 - abar_s) / (1 - abar_t) * u
        u = mean + ((1 - ratio) * (1 - abar_s) / (1 - abar_t)) ** 0.5 * noise_of(levels, tuple(u.shape))(s)
    return u


def paper_2s(u: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """DPM-Solver++, algorithm 1, with r from the level in between; then a step of first order if one is left."""
    i = 0
    while i + 2 < len(levels):
        t, middle, s = levels[i : i + 3]
        h = s.log_snr - t.log_snr
        r = (middle.log_snr - t.log_snr) / h
        x = some_estimate(u, t)
        v = middle.sigma / t.sigma * u - middle.alpha * (math.exp(-r * h) - 1) * x
        d = (1 - 1 / (2 * r)) * x + 1 / (2 * r) * some_estimate(v, middle)
        u = s.sigma / t.sigma * u - s.alpha * (math.exp(-h) - 1) * d
        i += 2
    return paper_ddim(u, levels[i:])


def paper_2m(u: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """DPM-Solver++, algorithm 2."""
    h = [s.log_snr - t.log_snr for t, s in pairwise(levels)]
    estimates = []
    for i, (t, s) in enumerate(pairwise(levels)):
        estimates.append(some_estimate(u, t))
        d = estimates[i]
        if i > 0:
            r = h[i - 1] / h[i]
            d = (1 + 1 / (2 * r)) * estimates[i] - 1 / (2 * r) * estimates[i - 1]
        u = s.sigma / t.sigma * u - s.alpha * (math.exp(-h[i]) - 1) * d
    return u


def paper_2m_sde(u: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """SDE-DPM-Solver++(2M) of the same paper; the first step is SDE-DPM-Solver++(1)."""
    h = [s.log_snr - t.log_snr for t, s in pairwise(levels)]
    estimates = []
    for i, (t, s) in enumerate(pairwise(levels)):
        estimates.append(some_estimate(u, t))
        decay = math.exp(-h[i])
        drift = (1 - decay**2) * estimates[i]
        if i > 0:
            r = h[i - 1] / h[i]
            drift = drift + (1 - decay**2) / (2 * r) * (estimates[i] - estimates[i - 1])
        noise = noise_of(levels, tuple(u.shape))(s)
        u = s.sigma / t.sigma * decay * u + s.alpha * drift + s.sigma * (1 - decay**2) ** 0.5 * noise
    return u


PAPERS = {"ddim": paper_ddim, "ddpm": paper_ddpm, "dpm_2s": paper_2s, "dpm_2m": paper_2m, "dpm_2m_sde": paper_2m_sde}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("num_levels", CALLS)
def test_a_solver_is_the_papers_algorithm(name: str, num_levels: int) -> None:
    levels = uneven_levels(num_levels)
    start = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
    denoiser = Recorder(some_estimate)
    solve(name, denoiser, start, levels, noise_of(levels, (2, 3)))
    torch.testing.assert_close(denoiser.inputs[-1], PAPERS[name](start, levels), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_2s", 2), ("dpm_2m", 2), ("dpm_3m", 3)])
def test_the_order_of_convergence(name: str, order: int) -> None:
    """Twice the steps, 2^-order the error."""
    start = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    gaussian, errors = Gaussian(), []
    for steps in (512, 1024):
        levels = levels_between(steps + 1)
        denoiser = Recorder(gaussian.estimate)
        solve(name, denoiser, start, levels)
        exact = gaussian.flow(start, levels[0], levels[-1])
        errors.append((denoiser.inputs[-1] - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_the_third_order_meets_a_parabola_exactly() -> None:
    """If the estimate is a parabola in lambda, each step after the first is the integral of it, however uneven.

    u_s = (sigma_s / sigma_t) u_t + sigma_s int e^lambda estimate(lambda) d lambda (proposition 4.1 of the paper).
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def parabola(log_snr):
        return 0.3 + 0.7 * log_snr - 0.4 * log_snr**2

    levels = uneven_levels(8)
    denoiser = Recorder(lambda u, level: torch.full_like(u, parabola(level.log_snr)))
    solve("dpm_3m", denoiser, torch.zeros(1, dtype=torch.float64), levels)
    for i in range(2, 7):
        t, s = levels[i : i + 2]
        half = (s.log_snr - t.log_snr) / 2
        log_snr = t.log_snr + half * (1 + nodes)
        integral = (half * weights * np.exp(log_snr) * parabola(log_snr)).sum()
        expected = s.sigma / t.sigma * denoiser.inputs[i].item() + s.sigma * integral
        assert denoiser.inputs[i + 1].item() == pytest.approx(expected, rel=1e-9)


def moments(name: str, levels: list[NoiseLevel], gaussian: Gaussian) -> tuple[float, float]:
    """Mean and deviation of u at the last level, exactly: for a Gaussian, u is linear in every normal number drawn.

    Element 0 is what becomes of the mean, where none is drawn; each of the others adds one normal number's effect.
    """
    count = len(levels) + 1

    def unit(index: int) -> Tensor:
        return torch.eye(count, dtype=torch.float64)[index]

    start = levels[0].alpha * gaussian.mean + gaussian.spread(levels[0]) * unit(1)
    draws = {level: unit(2 + step) for step, level in enumerate(levels[1:])}
    denoiser = Recorder(gaussian.estimate)
    solve(name, denoiser, start, levels, draws.__getitem__)
    u = denoiser.inputs[-1]
    return u[0].item(), (u[1:] - u[0]).norm().item()


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("num_levels", [2, 3, 9])
def test_a_known_answer_is_noised_to_every_level_exactly(name: str, num_levels: int) -> None:
    """For a known u_0, every jump lands on q(u_s | u_0) = N(alpha_s u_0, sigma_s^2), however long it is."""
    levels = uneven_levels(num_levels)
    mean, deviation = moments(name, levels, Gaussian(deviation=0.0))
    assert mean == pytest.approx(levels[-1].alpha * MU, rel=1e-9)
    assert deviation == pytest.approx(levels[-1].sigma, rel=1e-9)


@pytest.mark.parametrize(("name", "order"), [("ddpm", 1), ("dpm_2m_sde", 2)])
def test_the_weak_order_of_convergence(name: str, order: int) -> None:
    """Stochastic solvers have the right mean, and a deviation that comes nearer at their order."""
    gaussian, errors = Gaussian(), []
    for steps in (128, 256):
        levels = levels_between(steps + 1)
        mean, deviation = moments(name, levels, gaussian)
        assert mean == pytest.approx(levels[-1].alpha * MU, rel=1e-9)
        errors.append(abs(deviation - gaussian.spread(levels[-1])))
    assert errors[1] < 0.006
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("steps", [4, 8, 16, 32])
def test_the_second_order_sde_solver_is_nearer_than_ancestral_sampling(steps: int) -> None:
    gaussian, levels = Gaussian(), levels_between(steps + 1)
    error = {name: abs(moments(name, levels, gaussian)[1] - gaussian.spread(levels[-1])) for name in STOCHASTIC}
    assert error["dpm_2m_sde"] < 0.6 * error["ddpm"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_drawn_have_the_gaussians_mean_and_deviation(name: str) -> None:
    """The same with numbers that are drawn."""
    gaussian, levels = Gaussian(), levels_between(65)
    noise = noise_of(levels, (20_000,))
    denoiser = Recorder(gaussian.estimate)
    start = levels[0].alpha * MU + gaussian.spread(levels[0]) * noise(levels[0])
    solve(name, denoiser, start, levels, noise)
    mean, deviation = moments(name, levels, gaussian)
    assert denoiser.inputs[-1].mean().item() == pytest.approx(mean, abs=0.015)
    assert denoiser.inputs[-1].std().item() == pytest.approx(deviation, abs=0.015)


@every_solver
@pytest.mark.parametrize("num_calls", CALLS)
def test_every_level_is_one_call(name: str, num_calls: int) -> None:
    levels = uneven_levels(num_calls)
    denoiser = Recorder(some_estimate)
    out = solve(name, denoiser, torch.zeros(3), levels, lambda _: torch.zeros(3))
    assert denoiser.levels == levels
    assert torch.equal(out, some_estimate(denoiser.inputs[-1], levels[-1]))


@every_solver
def test_one_call_returns_the_first_estimate(name: str) -> None:
    (level,) = SCHEDULE.levels(time_grid("uniform", SCHEDULE, 1))
    start = torch.randn(3)
    out = solve(name, some_estimate, start, [level])
    assert torch.equal(out, some_estimate(start, level))


@every_solver
@pytest.mark.parametrize("num_calls", CALLS)
@pytest.mark.parametrize("num_timesteps", [2, 100])
def test_an_answer_known_from_the_start_stays(name: str, num_calls: int, num_timesteps: int) -> None:
    """Also with more calls than timesteps; u is then the answer as q(u_t | u_0) noises it."""
    schedule = NoiseSchedule("sqrt", num_timesteps)
    for grid in TIME_GRIDS:
        levels = schedule.levels(time_grid(grid, schedule, num_calls))
        denoiser = Recorder(lambda u, level: torch.full_like(u, 3.0))
        out = solve(name, denoiser, torch.randn(4), levels, noise_of(levels, (4,)))
        assert torch.equal(out, torch.full((4,), 3.0))
        assert ((denoiser.inputs[-1] - levels[-1].alpha * 3.0).abs() < 5 * levels[-1].sigma).all()


@pytest.mark.parametrize(
    ("name", "grid"), [("dpm_2m", "uniform"), ("dpm_2m", "log_snr"), *((name, "quadratic") for name in DETERMINISTIC)]
)
@pytest.mark.parametrize("num_calls", [10, 20, 50])
def test_few_calls_come_close_over_the_whole_schedule(name: str, grid: str, num_calls: int) -> None:
    gaussian = Gaussian()
    levels = SCHEDULE.levels(time_grid(grid, SCHEDULE, num_calls))
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    out = solve(name, gaussian.estimate, start, levels)
    exact = gaussian.estimate(gaussian.flow(start, levels[0], levels[-1]), levels[-1])
    assert (out - exact).abs().max() < 1.1 / num_calls


LANDINGS = {"dpm_2s": [2, 4, 5], "dpm_3m": [2, 3, 4, 5]}


@every_solver
def test_what_becomes_of_u_after_a_step_is_what_the_next_starts_from(name: str) -> None:
    """Each step ends at one level, and noise is asked for once, at that level."""
    levels, ended, drawn = uneven_levels(6), [], []

    def draw(level: NoiseLevel) -> Tensor:
        drawn.append(level)
        return torch.zeros(2)

    def marked(u: Tensor, level: NoiseLevel) -> Tensor:
        ended.append(level)
        return torch.full_like(u, float(len(ended)))

    denoiser = Recorder(some_estimate)
    solve(name, denoiser, torch.zeros(2), levels, draw, marked)
    assert ended == [levels[i] for i in LANDINGS.get(name, range(1, 6))]
    assert drawn == (ended if name in STOCHASTIC else [])
    for count, level in enumerate(ended, start=1):
        assert denoiser.inputs[levels.index(level)].tolist() == [count, count]


@every_solver
def test_few_estimates_are_kept_at_a_time(name: str) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def estimate(u: Tensor, level: NoiseLevel) -> Tensor:
        assert sum(reference() is not None for reference in kept) <= 3
        kept.append(weakref.ref(out := u.clone()))
        return out

    solve(name, estimate, torch.zeros(2), uneven_levels(30), lambda _: torch.zeros(2))
    assert len(kept) == 30


def test_every_solver_is_either_deterministic_or_stochastic() -> None:
    assert sorted(DETERMINISTIC + STOCHASTIC) == sorted(SOLVERS)
