"""Solvers against a Gaussian, whose denoiser and whose solution are known.

For u_0 ~ N(mu, s^2), u_t ~ N(alpha mu, S^2) with S^2 = alpha^2 s^2 + sigma^2; the best estimate of u_0 is linear in
u_t, and the probability-flow ODE keeps (u_t - alpha mu) / S constant.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.diffusion.solvers import SOLVERS, ddpm, dpm_solver, time_grid

MU, S = 1.5, 0.4


class Gaussian:
    """The exact denoiser, which remembers where it was asked."""

    def __init__(self, schedule: NoiseSchedule, mean: float = MU, deviation: float = S) -> None:
        self.alpha = schedule.alpha_bar_t.sqrt()
        self.sigma = (1 - schedule.alpha_bar_t).sqrt()
        self.mean, self.deviation = mean, deviation
        self.asked: list[int] = []
        self.u: Tensor | None = None

    def spread(self, t: int) -> float:
        return math.hypot(self.alpha[t].item() * self.deviation, self.sigma[t].item())

    def predict(self, u: Tensor, t: int) -> Tensor:
        self.asked.append(t)
        self.u = u
        gain = self.alpha[t] * self.deviation**2 / self.spread(t) ** 2
        return self.mean + gain * (u - self.alpha[t] * self.mean)

    def flow(self, u: Tensor, t: int, s: int) -> Tensor:
        """The exact solution of the ODE at s, from u at t."""
        normed = (u - self.alpha[t] * self.mean) / self.spread(t)
        return self.alpha[s] * self.mean + self.spread(s) * normed


def no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic solver asked for noise")


def even_in_log_ratio(schedule: NoiseSchedule, num_steps: int, first: float, last: float) -> list[int]:
    """Timesteps nearest to points evenly spaced in log(alpha / sigma), between two shares of T."""
    abar = schedule.alpha_bar_t.numpy()
    log_ratio = 0.5 * (np.log(abar) - np.log1p(-abar))
    ends = log_ratio[int(first * len(abar))], log_ratio[int(last * len(abar))]
    points = np.linspace(*ends, num_steps)
    return [int(np.searchsorted(-log_ratio, -point)) for point in points]


def first_order(predict, u, schedule, grid, draw_normal) -> Tensor:
    """DDIM, which is DPM-Solver++(1): hold the estimate over the step."""
    alpha, sigma = schedule.alpha_bar_t.sqrt(), (1 - schedule.alpha_bar_t).sqrt()
    for t, s in itertools.pairwise(grid):
        estimate = predict(u, t)
        noise = (u - alpha[t] * estimate) / sigma[t]
        u = alpha[s] * estimate + sigma[s] * noise
    return predict(u, grid[-1])


def order_of(solver) -> float:
    """The slope of log error over log number of steps, at the last time of the grid."""
    schedule = NoiseSchedule(200_000)
    num_steps, errors = [16, 32, 64, 128], []
    start = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    for steps in num_steps:
        gaussian = Gaussian(schedule)
        grid = even_in_log_ratio(schedule, steps + 1, first=0.95, last=0.02)
        solver(gaussian.predict, start, schedule, grid, no_noise)
        exact = gaussian.flow(start, grid[0], grid[-1])
        errors.append((gaussian.u - exact).abs().max().item())
    return -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]


def test_dpm_solver_is_of_second_order() -> None:
    assert order_of(dpm_solver) == pytest.approx(2.0, abs=0.1)


def test_holding_the_estimate_is_of_first_order() -> None:
    """So the test above would notice a solver that lost its second order."""
    assert order_of(first_order) == pytest.approx(1.0, abs=0.1)


def test_the_first_step_is_of_first_order_and_the_second_is_not() -> None:
    schedule = NoiseSchedule(2000)
    start = torch.tensor([0.3], dtype=torch.float64)
    one, two = [1500, 1000], [1500, 1000, 500]
    solutions = {}
    for solver in (dpm_solver, first_order):
        for grid in (one, two):
            gaussian = Gaussian(schedule)
            solver(gaussian.predict, start, schedule, grid, no_noise)
            solutions[solver, len(grid)] = gaussian.u.item()
    assert solutions[dpm_solver, 2] == pytest.approx(solutions[first_order, 2], rel=1e-6)
    assert abs(solutions[dpm_solver, 3] - solutions[first_order, 3]) > 1e-3


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_few_steps_on_the_real_grid_come_close(num_steps: int) -> None:
    """The whole way from t = T - 1 to t = 0, evenly in t as generation goes."""
    schedule = NoiseSchedule(2000)
    gaussian = Gaussian(schedule)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    out = dpm_solver(gaussian.predict, start, schedule, time_grid(2000, num_steps), no_noise)
    exact = gaussian.predict(gaussian.flow(start, 1999, 0), 0)
    assert (out - exact).abs().max() < 1.5 / num_steps


def test_a_point_is_reached_in_any_number_of_steps() -> None:
    """If the estimate is the answer from the start, every solver stays with it."""
    schedule = NoiseSchedule(100)
    for solver in SOLVERS.values():
        for num_steps in (1, 2, 3, 100):
            out = solver(
                lambda u, t: torch.full_like(u, 3.0),
                torch.randn(4),
                schedule,
                time_grid(100, num_steps),
                lambda i: torch.randn(4),
            )
            assert torch.equal(out, torch.full((4,), 3.0))


def test_ddpm_reproduces_the_gaussian() -> None:
    """With every step taken, u has the mean and variance of u_t (down to t = T / 50: the first steps are long)."""
    schedule, generator = NoiseSchedule(1000), torch.Generator().manual_seed(0)
    gaussian = Gaussian(schedule)

    def draw(step: int) -> Tensor:
        return torch.randn(20_000, generator=generator, dtype=torch.float64)

    ddpm(gaussian.predict, draw(0), schedule, list(range(999, 19, -1)), draw)
    assert gaussian.u.mean().item() == pytest.approx(gaussian.alpha[20].item() * MU, abs=0.02)
    assert gaussian.u.std().item() == pytest.approx(gaussian.spread(20), abs=0.01)


def test_ddpm_steps_have_the_exact_posterior_over_any_gap() -> None:
    """For a known u_0, every jump lands on q(u_s | u_0) = N(alpha_s u_0, sigma_s^2), however long it is."""
    schedule, generator = NoiseSchedule(1000), torch.Generator().manual_seed(0)
    point = Gaussian(schedule, mean=1.5, deviation=0.0)
    for grid in ([999, 500], [999, 700, 20], [800, 799, 100]):
        first = grid[0]
        noise = torch.randn(len(grid), 50_000, generator=generator, dtype=torch.float64)
        start = point.alpha[first] * 1.5 + point.sigma[first] * noise[-1]
        ddpm(point.predict, start, schedule, grid, lambda i, noise=noise: noise[i])
        last = grid[-1]
        assert point.u.mean().item() == pytest.approx(point.alpha[last].item() * 1.5, abs=0.02)
        assert point.u.std().item() == pytest.approx(point.sigma[last].item(), rel=0.02)


def test_ddpm_asks_for_the_noise_of_each_step_once() -> None:
    asked = []

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1)

    schedule = NoiseSchedule(50)
    ddpm(lambda u, t: u, torch.zeros(1), schedule, time_grid(50, 5), draw)
    assert asked == [0, 1, 2, 3]  # none after the last


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
def test_one_call_a_grid_point(solver, num_steps: int) -> None:
    schedule = NoiseSchedule(20)
    gaussian = Gaussian(schedule)
    grid = time_grid(20, num_steps)
    solver(gaussian.predict, torch.zeros(3), schedule, grid, lambda i: torch.zeros(3))
    assert gaussian.asked == grid


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_one_step_returns_the_first_estimate(solver) -> None:
    schedule = NoiseSchedule(20)
    gaussian = Gaussian(schedule)
    start = torch.randn(3)
    out = solver(gaussian.predict, start, schedule, time_grid(20, 1), no_noise)
    assert torch.equal(out, gaussian.predict(start, 19))


@pytest.mark.parametrize(("num_timesteps", "num_steps"), [(2000, 20), (2000, 2000), (20, 7), (2, 2), (50, 49)])
def test_the_grid_runs_from_the_last_timestep_to_the_first(num_timesteps: int, num_steps: int) -> None:
    grid = time_grid(num_timesteps, num_steps)
    assert (len(grid), grid[0], grid[-1]) == (num_steps, num_timesteps - 1, 0)
    assert grid == sorted(set(grid), reverse=True)  # no step is empty
    gaps = -np.diff(grid)
    assert gaps.max() - gaps.min() <= 1
    assert all(isinstance(t, int) for t in grid)


def test_a_grid_of_one_starts_where_the_noise_is() -> None:
    assert time_grid(2000, 1) == [1999]
