"""Where between pure noise and clean data the denoiser is called.

A grid runs from T - 1 down to 0 in timesteps that are real numbers, so that there may be more of them than T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdseq.diffusion.schedule import NoiseSchedule


def _uniform(schedule: NoiseSchedule, share_n: Tensor) -> Tensor:
    """Evenly in t."""
    return schedule.last * share_n


def _log_snr(schedule: NoiseSchedule, share_n: Tensor) -> Tensor:
    """Evenly in lambda, in which solvers make steps of equal length (DPM-Solver, arXiv 2206.00927, section 3.4)."""
    noisiest, cleanest = schedule.log_snr_t[-1], schedule.log_snr_t[0]
    return schedule.timestep_of(torch.lerp(cleanest, noisiest, share_n))


def _quadratic(schedule: NoiseSchedule, share_n: Tensor) -> Tensor:
    """Evenly in sqrt(t): dense where there is little noise (DDIM, arXiv 2010.02502, appendix D.2)."""
    return schedule.last * share_n.square()


TIME_GRIDS: dict[str, Callable[[NoiseSchedule, Tensor], Tensor]] = {
    "uniform": _uniform,
    "log_snr": _log_snr,
    "quadratic": _quadratic,
}


def time_grid(name: str, schedule: NoiseSchedule, num_points: int) -> list[float]:
    """`num_points` timesteps, strictly descending from T - 1 to 0; a single one is T - 1.

    Args:
        name: A key of TIME_GRIDS, which map what is left of the way, from 1 to 0, to timesteps.
        schedule: Noise schedule.
        num_points: At least 1; may exceed T.
    """
    share_n = torch.linspace(1, 0, num_points, dtype=torch.float64)
    return TIME_GRIDS[name](schedule, share_n).tolist()
