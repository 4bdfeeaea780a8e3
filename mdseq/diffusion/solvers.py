"""From noise to data, with a given number of denoiser calls.

Solvers work on u = z - m, for which the process with the soft absorbing state is a plain variance-preserving one:
u_t = alpha_t u_0 + sigma_t eps. With lambda = log(alpha / sigma), h the step in lambda from t to s, and one estimate D
of u_0 held over the step, the equations that lead back to the data have exact solutions (Lu et al., arXiv 2211.01095):

    ODE   u_s = (sigma_s / sigma_t) u_t + alpha_s (1 - e^-h) D
    SDE   u_s = (sigma_s / sigma_t) e^-h u_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) eps

All solvers take such steps. They differ in D: what the denoiser says at t, or that and what it said at other levels,
extrapolated over the step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mdseq.diffusion.schedule import NoiseLevel


@dataclass(frozen=True)
class ReverseProcess:
    """What a solver is given besides its starting point.

    Attributes:
        levels: Ever less noise.
        predict: The denoiser's estimate of u_0 from u at a level.
        draw_normal: Standard normal noise of u's shape for the step that ends at a level.
        after_step: What becomes of u when a step has ended at a level.
    """

    levels: Sequence[NoiseLevel]
    predict: Callable[[Tensor, NoiseLevel], Tensor]
    draw_normal: Callable[[NoiseLevel], Tensor]
    after_step: Callable[[Tensor, NoiseLevel], Tensor]


# Takes u at the first level to the denoiser's estimate of u_0 at the last one, with one call at each level, in order.
Solver = Callable[[ReverseProcess, Tensor], Tensor]


def ddim(process: ReverseProcess, u: Tensor) -> Tensor:
    """DDIM without noise (arXiv 2010.02502, eq. 12), which is DPM-Solver++(1): first order."""
    return _multistep(process, u, process.levels, _ode_step, deque(maxlen=1))


def ddpm(process: ReverseProcess, u: Tensor) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239, eq. 7) over steps of any length, which is SDE-DPM-Solver++(1).

    Each step draws from the posterior q(u_s | u_t, u_0) with the predicted u_0.
    """
    return _multistep(process, u, process.levels, _sde_step, deque(maxlen=1))


def dpm_2s(process: ReverseProcess, u: Tensor) -> Tensor:
    """DPM-Solver++(2S) (algorithm 1): second order, two calls a step, nothing remembered between steps.

    Every other level lies within a step. Where that leaves one over, the last step is of first order.
    """
    levels = process.levels
    for t, middle, s in zip(levels[0::2], levels[1::2], levels[2::2], strict=False):
        u = _two_call_step(process, u, t, middle, s, deque(maxlen=2))
    left_over = levels[-2:] if len(levels) % 2 == 0 else levels[-1:]
    return _multistep(process, u, left_over, _ode_step, deque(maxlen=1))


def dpm_2m(process: ReverseProcess, u: Tensor) -> Tensor:
    """DPM-Solver++(2M) (algorithm 2): second order, one call a step. Its first step is of first order."""
    return _multistep(process, u, process.levels, _ode_step, deque(maxlen=2))


def dpm_2m_sde(process: ReverseProcess, u: Tensor) -> Tensor:
    """SDE-DPM-Solver++(2M): ancestral sampling with the D of DPM-Solver++(2M)."""
    return _multistep(process, u, process.levels, _sde_step, deque(maxlen=2))


def dpm_3m(process: ReverseProcess, u: Tensor) -> Tensor:
    """DPM-Solver++(3M): third order, one call a step.

    It starts with a step of DPM-Solver++(2S), which spends the first two calls: a first step of first order, as is
    usual, would leave the whole of second. Two levels are too few for that; they make one step of first order.
    """
    levels, newest = process.levels, deque[_Known](maxlen=3)
    if len(levels) > 2:
        t, middle, s = levels[:3]
        u = _two_call_step(process, u, t, middle, s, newest)
        levels = levels[2:]
    return _multistep(process, u, levels, _ode_step, newest)


SOLVERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_2s": dpm_2s,
    "dpm_2m": dpm_2m,
    "dpm_3m": dpm_3m,
    "dpm_2m_sde": dpm_2m_sde,
}


@dataclass(frozen=True)
class _Known:
    """What the denoiser said at a level."""

    level: NoiseLevel
    estimate: Tensor


_Step = Callable[[ReverseProcess, Tensor, NoiseLevel, NoiseLevel, Tensor], Tensor]


def _ode_step(process: ReverseProcess, u: Tensor, t: NoiseLevel, s: NoiseLevel, estimate: Tensor) -> Tensor:
    h = s.log_snr - t.log_snr
    return s.sigma / t.sigma * u - s.alpha * math.expm1(-h) * estimate


def _sde_step(process: ReverseProcess, u: Tensor, t: NoiseLevel, s: NoiseLevel, estimate: Tensor) -> Tensor:
    h = s.log_snr - t.log_snr
    kept = s.sigma / t.sigma * math.exp(-h)
    renewed = -math.expm1(-2 * h)
    return kept * u + s.alpha * renewed * estimate + s.sigma * math.sqrt(renewed) * process.draw_normal(s)


def _multistep(
    process: ReverseProcess, u: Tensor, levels: Sequence[NoiseLevel], step: _Step, newest: deque[_Known]
) -> Tensor:
    """One call a step; D comes from the estimates in `newest`, which holds as many as the order asks for."""
    for t, s in pairwise(levels):
        newest.append(_Known(t, process.predict(u, t)))
        u = process.after_step(step(process, u, t, s, _extrapolated(newest, s)), s)
    return process.predict(u, levels[-1])


def _two_call_step(
    process: ReverseProcess, u: Tensor, t: NoiseLevel, middle: NoiseLevel, s: NoiseLevel, newest: deque[_Known]
) -> Tensor:
    """A step from t to s by way of a level in between, with an error of O(h^3); both estimates go to `newest`."""
    first = process.predict(u, t)
    second = process.predict(_ode_step(process, u, t, middle, first), middle)
    newest.extend((_Known(t, first), _Known(middle, second)))
    share = (s.log_snr - t.log_snr) / (2 * (middle.log_snr - t.log_snr))
    return process.after_step(_ode_step(process, u, t, s, (1 - share) * first + share * second), s)


def _extrapolated(known: Sequence[_Known], s: NoiseLevel) -> Tensor:
    """D for the step from the newest known level t to s, from one to three estimates, oldest first.

    Three, at x = 0, -a and -b of x = (lambda - lambda_t) / h, are met by the parabola e + c_1 x + c_2 x^2. The ODE
    weighs the estimate at x by e^-h(1 - x), which gives x^n the mean m_n / m_0 over the step:

        m_n = h int_0^1 e^-h(1 - x) x^n dx:   m_0 = 1 - e^-h,   m_1 = 1 - m_0 / h,   m_2 = 1 - 2 m_1 / h

    Two give DPM-Solver++(2M)'s D = e + c_1 / 2. The authors' code gives c_2 half its weight, and with it their solver
    of third order is of second.
    """
    *earlier, newest = known
    if not earlier:
        return newest.estimate
    t = newest.level.log_snr
    h = s.log_snr - t
    a = (t - earlier[-1].level.log_snr) / h
    slope = (newest.estimate - earlier[-1].estimate) / a
    if len(earlier) == 1:
        return newest.estimate + slope / 2
    b = (t - earlier[-2].level.log_snr) / h
    earlier_slope = (earlier[-1].estimate - earlier[-2].estimate) / (b - a)
    c_2 = (slope - earlier_slope) / b
    m_0 = -math.expm1(-h)
    m_1 = 1 - m_0 / h
    m_2 = 1 - 2 * m_1 / h
    return newest.estimate + (m_1 * (slope + a * c_2) + m_2 * c_2) / m_0
