"""How much signal is left at each timestep.

z_t = alpha_t z_0 + sigma_t eps, with alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), t = 0 .. T-1.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSchedule:
    """DiffuSeq's "sqrt" schedule: abar(u) = 1 - sqrt(u + 1e-4) (Li et al., arXiv 2205.14217, appendix A).

    beta_t = min(1 - abar((t + 1) / T) / abar(t / T), 0.999) and abar_t = prod (1 - beta_s), s <= t, so that the
    product starts at 1 although abar(0) = 0.99 (gaussian_diffusion.py, get_named_beta_schedule).

    Attributes:
        num_timesteps: T.
        alpha_bar_t: float64 [T], the signal's share of the variance after each step.
        beta_t: float64 [T], the variance added by each step.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        grid = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        signal = 1.0 - (grid + 1e-4).sqrt()
        self.beta_t = (1.0 - signal[1:] / signal[:-1]).clamp(max=0.999)
        self.alpha_bar_t = (1.0 - self.beta_t).cumprod(dim=0)
        self._alpha_bar_on: dict[torch.device, Tensor] = {}

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in fp32, of the timesteps' shape."""
        device = timestep.device
        if device not in self._alpha_bar_on:
            self._alpha_bar_on[device] = self.alpha_bar_t.to(device)
        alpha_bar = self._alpha_bar_on[device][timestep]
        return alpha_bar.sqrt().float(), (1.0 - alpha_bar).sqrt().float()

    def time(self, timestep: Tensor) -> Tensor:
        """What the denoiser is told: t * 1000 / T, so that it does not depend on T (`rescale_timesteps`)."""
        return timestep.float() * (1000.0 / self.num_timesteps)
