"""From noise to data, with a given number of denoiser calls.

Solvers work on u = z - m, for which the process with the soft absorbing state is a plain variance-preserving one:
u_t = alpha_t u_0 + sigma_t eps. `predict(u, t)` is the denoiser's estimate of u_0 from u at the timestep t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mdseq.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, int], Tensor]
DrawNormal = Callable[[int], Tensor]


class Solver(Protocol):
    """Takes u at the first timestep of the grid to an estimate of u_0.

    Args:
        predict: The denoiser; called once for each timestep of the grid.
        u: Starting point.
        schedule: Noise schedule.
        grid: Timesteps, descending.
        draw_normal: Standard normal noise of u's shape for the i-th step; deterministic solvers ignore it.
    """

    def __call__(
        self, predict: Predict, u: Tensor, schedule: NoiseSchedule, grid: list[int], draw_normal: DrawNormal
    ) -> Tensor: ...


def time_grid(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps from T - 1 down to 0, evenly spaced."""
    assert 1 <= num_steps <= num_timesteps, f"{num_steps} steps of {num_timesteps}"
    return torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64).round().long().tolist()


def ddpm(predict: Predict, u: Tensor, schedule: NoiseSchedule, grid: list[int], draw_normal: DrawNormal) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239, eq. 7), between any two timesteps of the grid.

    u_s = c_0 u_0 + c_t u_t + sqrt(v) eps: the posterior q(u_s | u_t, u_0) with the predicted u_0.
    """
    alpha_bar = schedule.alpha_bar_t
    for i, (t, s) in enumerate(pairwise(grid)):
        abar_t, abar_s = alpha_bar[t].item(), alpha_bar[s].item()
        ratio = abar_t / abar_s
        c_0 = abar_s**0.5 * (1 - ratio) / (1 - abar_t)
        c_t = ratio**0.5 * (1 - abar_s) / (1 - abar_t)
        variance = (1 - ratio) * (1 - abar_s) / (1 - abar_t)
        u = c_0 * predict(u, t) + c_t * u + variance**0.5 * draw_normal(i)
    return predict(u, grid[-1])


def dpm_solver(
    predict: Predict, u: Tensor, schedule: NoiseSchedule, grid: list[int], draw_normal: DrawNormal
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): second order, one call a step.

    With lambda = log(alpha / sigma), h the step in lambda and r = h_previous / h,

        D = (1 + 1 / 2r) u_0(t) - 1 / 2r u_0(t_previous)
        u_s = (sigma_s / sigma_t) u_t - alpha_s (e^-h - 1) D
    """
    alpha = schedule.alpha_bar_t.sqrt().tolist()
    sigma = (1 - schedule.alpha_bar_t).sqrt().tolist()
    log_ratio = (schedule.alpha_bar_t.log() - torch.log1p(-schedule.alpha_bar_t)).div(2).tolist()
    previous: tuple[Tensor, float] | None = None
    for t, s in pairwise(grid):
        estimate = predict(u, t)
        h = log_ratio[s] - log_ratio[t]
        if previous is None:
            d = estimate
        else:
            earlier, h_previous = previous
            half = h / (2 * h_previous)
            d = (1 + half) * estimate - half * earlier
        u = sigma[s] / sigma[t] * u - alpha[s] * math.expm1(-h) * d
        previous = estimate, h
    return predict(u, grid[-1])


SOLVERS: dict[str, Solver] = {"dpm_2m": dpm_solver, "ddpm": ddpm}
