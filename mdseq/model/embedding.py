"""Embeddings of time and of position.

Shapes: b batch, l length, s slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then a two-layer network (DiffuSeq, transformer_model.py)."""

    def __init__(self, sinusoid_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.sinusoid_dim = sinusoid_dim
        self.expand = nn.Linear(sinusoid_dim, 4 * sinusoid_dim)
        self.project = nn.Linear(4 * sinusoid_dim, hidden_dim)

    def forward(self, time_bl: Tensor) -> Tensor:
        """Time in [0, 1000] of each position to [b, l, hidden_dim]."""
        half = self.sinusoid_dim // 2
        exponent = torch.arange(half, device=time_bl.device, dtype=torch.float32) / half
        angle = time_bl[..., None].float() * torch.exp(-math.log(10_000) * exponent)
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.expand.weight.dtype)
        sinusoid = nn.functional.pad(sinusoid, (0, self.sinusoid_dim % 2))
        return self.project(nn.functional.silu(self.expand(sinusoid)))


def rotary_angles(position_bs: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864), each fp32 [b, s, 1, head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, device=position_bs.device, dtype=torch.float32) / head_dim
    angle = position_bs[..., None, None].float() * ROTARY_BASE**-exponent
    return angle.cos(), angle.sin()
