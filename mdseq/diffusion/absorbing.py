"""The soft absorbing state (DiffuSeq-v2, arXiv 2310.05793): targets drift to a learned vector m, not to zero.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

AbsorbingSchedule = Literal["sigma", "uniform"]
Number = TypeVar("Number", float, Tensor)


class AbsorbingState(nn.Module):
    """The vector m: learned, from N(0, 1/z), or a fixed zero, which is the process without an absorbing state."""

    m: Tensor

    def __init__(self, embedding_dim: int, learned: bool) -> None:
        super().__init__()
        if learned:
            self.m = nn.Parameter(torch.randn(embedding_dim) * embedding_dim**-0.5)
        else:
            self.register_buffer("m", torch.zeros(embedding_dim), persistent=False)

    def forward(self) -> Tensor:
        """m in fp32, [z]."""
        return self.m.float().clone()  # a copy: ZeRO-3 frees the parameter itself when this call ends


@dataclass(frozen=True)
class Absorption:
    """The discrete part of the process: target tokens that are replaced by m.

    Attributes:
        gamma: The largest share of them that is replaced; 0 without a discrete part.
        schedule: How large it is. "sigma": gamma * sigma_t (DiffuSeq-v2). "uniform": in training anything up to gamma,
            as likely and whatever t is; on the way from noise, gamma * t / (T - 1), as in discrete diffusion by masks
            (MDLM, arXiv 2406.07524).
    """

    gamma: float
    schedule: AbsorbingSchedule = "sigma"

    def probability(self, way: Number, sigma: Number) -> Number:
        """That a token is replaced, with sigma_t of noise, at t / (T - 1) of the way or what is drawn in its place."""
        return self.gamma * (sigma if self.schedule == "sigma" else way)


def corrupt(z_0: Tensor, m_z: Tensor, alpha: Tensor, sigma: Tensor, epsilon: Tensor, replaced_bl: Tensor) -> Tensor:
    """The forward process q(z_t | z_0) of target positions.

    z_t = alpha_t (z_0 - m) + sigma_t eps + m, then exactly m where `replaced_bl` (the discrete part).

    Args:
        z_0, epsilon: [b, l, z].
        m_z: [z].
        alpha, sigma: [b, l].
        replaced_bl: Positions that lose their content, drawn with the probability of an `Absorption`.
    """
    z_t = alpha[..., None] * (z_0 - m_z) + sigma[..., None] * epsilon + m_z
    return torch.where(replaced_bl[..., None], m_z, z_t)
