"""How much signal is left at each timestep.

z_t = alpha_t z_0 + sigma_t eps, with alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), for t from 0 to T - 1.

Every schedule is a table of T values of lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio, which
falls strictly with t. Between its timesteps lambda is linear in t, so that t may be any number in [0, T - 1]: this is
the continuous time of training, of solvers with steps of their own, and of the likelihood bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.errors import UserError
from mdseq.spec import DiffusionSpec

# What the denoiser is told runs from 0 to this, whatever T is (DiffuSeq's `rescale_timesteps`).
TIME_SCALE = 1000.0
# What it is told of a position that is empty for another reason than noise, such as a source token that was dropped.
NO_TIME = 2 * TIME_SCALE


def _betas_of(signal: Callable[[Tensor], Tensor], num_timesteps: int) -> Tensor:
    """beta_t = min(1 - abar((t + 1) / T) / abar(t / T), 0.999) (gaussian_diffusion.py, betas_for_alpha_bar)."""
    signal_t = signal(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    return (1.0 - signal_t[1:] / signal_t[:-1]).clamp(max=0.999)


def _sqrt(num_timesteps: int) -> Tensor:
    """abar(u) = 1 - sqrt(u + 1e-4) (Diffusion-LM, arXiv 2205.14217, appendix A)."""
    return _betas_of(lambda u: 1.0 - (u + 1e-4).sqrt(), num_timesteps)


def _cosine(num_timesteps: int) -> Tensor:
    """abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2) (improved DDPM, arXiv 2102.09672, eq. 17)."""
    return _betas_of(lambda u: ((u + 0.008) / 1.008 * math.pi / 2).cos().square(), num_timesteps)


def _linear(num_timesteps: int) -> Tensor:
    """beta from 1e-4 to 0.02 over 1000 steps, scaled to T (DDPM, arXiv 2006.11239, section 4)."""
    scale = 1000.0 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)


def _warmup_decay(num_timesteps: int) -> Tensor:
    """sqrt, but its last tenth of betas falls linearly to 1e-4 (DiffuSeq-v2): some signal is left at t = T - 1."""
    beta_t = _sqrt(num_timesteps)
    count = max(1, num_timesteps // 10)
    decay = torch.linspace(beta_t[-count].item(), 1e-4, count, dtype=torch.float64)
    return torch.cat([beta_t[:-count], decay])


NOISE_SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "sqrt": _sqrt,
    "cosine": _cosine,
    "linear": _linear,
    "warmup_decay": _warmup_decay,
}


@dataclass(frozen=True)
class NoiseLevel:
    """One timestep in numbers that the host knows.

    Attributes:
        timestep: Any number in [0, T - 1].
        log_snr: lambda.
        alpha, sigma: Shares of signal and noise.
    """

    timestep: float
    log_snr: float
    alpha: float
    sigma: float


class NoiseSchedule:
    """The map between timesteps and noise.

    Attributes:
        name: A key of NOISE_SCHEDULES.
        num_timesteps: T, at least 2.
        last: T - 1, the noisiest timestep.
        log_snr_t: float64 [T], lambda of each timestep: that of the name, with abar_t = prod (1 - beta_s) over s <= t,
            less log(noise_factor). The process is the named one with noise so many times as strong (the noise factor
            of Difformer, arXiv 2212.09412, section 4.3), scaled back to the variance of the named one. With a
            `min_signal` it is the part of that process in which alpha is no less, stretched over all timesteps.
        min_signal: Least alpha; 0 for that of the whole schedule.
        alpha_bar_t: float64 [T], the signal's share of the variance, alpha_t^2.
    """

    @classmethod
    def of(cls, spec: DiffusionSpec) -> NoiseSchedule:
        """Raises UserError: the spec leaves more signal than there is."""
        return cls(spec.noise_schedule, spec.num_timesteps, spec.noise_factor, spec.min_signal)

    def __init__(self, name: str, num_timesteps: int, noise_factor: float = 1.0, min_signal: float = 0.0) -> None:
        assert num_timesteps >= 2, "between which timesteps would the others lie?"
        self.name = name
        self.min_signal = min_signal
        self.num_timesteps = num_timesteps
        self.last = num_timesteps - 1
        named_t = (1.0 - NOISE_SCHEDULES[name](num_timesteps)).cumprod(dim=0)
        self.log_snr_t = _log_snr_of(named_t) - math.log(noise_factor)
        self._stretch = 1.0
        if min_signal:
            end = self._end_at(min_signal)
            self._stretch = self.last / end
            self.log_snr_t = _read(self.log_snr_t, torch.linspace(0, end, num_timesteps, dtype=torch.float64))
        self._log_snr_on: dict[torch.device, Tensor] = {}
        self.alpha_bar_t = torch.sigmoid(2 * self.log_snr_t)
        assert (self.log_snr_t.diff() < 0).all(), f"{name}: noise must grow with every timestep"

    def _end_at(self, min_signal: float) -> float:
        """The timestep, of the whole schedule, that has so much signal."""
        most = alpha_sigma_of(self.log_snr_t[0])[0].item()
        if min_signal >= most:
            raise UserError(
                f"diffusion.min_signal = {min_signal} is more signal than there ever is: at t = 0, diffusion."
                f"noise_schedule = {self.name} with this noise_factor leaves {most:.3f}; give less than that"
            )
        alpha_bar = torch.tensor(min_signal, dtype=torch.float64).square()
        return _find(self.log_snr_t, _log_snr_of(alpha_bar)).item()

    def log_snr(self, timestep: Tensor) -> Tensor:
        """lambda at timesteps in [0, T - 1], float64, of their shape; exactly the table's at whole ones."""
        return _read(self._table(timestep.device), timestep)

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, float64; what lies outside the schedule gives its nearer end."""
        return _find(self._table(log_snr.device), log_snr)

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in fp32, of the timesteps' shape."""
        alpha, sigma = alpha_sigma_of(self.log_snr(timestep))
        return alpha.float(), sigma.float()

    def levels(self, timesteps: Sequence[float]) -> list[NoiseLevel]:
        """These timesteps one by one, in double precision, without waiting for a device."""
        timestep_n = torch.tensor(timesteps, dtype=torch.float64)
        log_snr_n = self.log_snr(timestep_n)
        numbers = (timestep_n, log_snr_n, *alpha_sigma_of(log_snr_n))
        return [NoiseLevel(*row) for row in torch.stack(numbers, dim=1).tolist()]

    def time(self, timestep: Tensor) -> Tensor:
        """What the denoiser is told: t * 1000 / T in fp32, so that it does not depend on T.

        With a `min_signal`, t is that of the whole schedule, where the noise is the same.
        """
        return (timestep.double() * (TIME_SCALE / self.num_timesteps / self._stretch)).float()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._log_snr_on:
            self._log_snr_on[device] = self.log_snr_t.to(device)
        return self._log_snr_on[device]


def _log_snr_of(alpha_bar: Tensor) -> Tensor:
    return (alpha_bar.log() - torch.log1p(-alpha_bar)) / 2


def _read(table_t: Tensor, timestep: Tensor) -> Tensor:
    """The table at timesteps, interpolated."""
    below = timestep.long().clamp(0, len(table_t) - 2)
    return torch.lerp(table_t[below], table_t[below + 1], timestep.double() - below)


def _find(table_t: Tensor, value: Tensor) -> Tensor:
    """The timesteps at which a falling table has these values, or its nearer end."""
    wanted = value.double().clamp(table_t[-1], table_t[0])
    below = torch.searchsorted(-table_t, -wanted).clamp(1, len(table_t) - 1) - 1
    return below + (table_t[below] - wanted) / (table_t[below] - table_t[below + 1])


def alpha_sigma_of(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of lambda: alpha^2 + sigma^2 = 1 and alpha / sigma = e^lambda."""
    return torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
