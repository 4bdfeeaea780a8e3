"""The soft absorbing state (DiffuSeq-v2, arXiv 2310.05793): targets drift to a learned vector m, not to zero.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def corrupt(z_0: Tensor, m_z: Tensor, alpha: Tensor, sigma: Tensor, epsilon: Tensor, replaced_bl: Tensor) -> Tensor:
    """The forward process q(z_t | z_0) of target positions.

    z_t = alpha_t (z_0 - m) + sigma_t eps + m, then exactly m where `replaced_bl` (the discrete part).

    Args:
        z_0, epsilon: [b, l, z].
        m_z: [z].
        alpha, sigma: [b, l].
        replaced_bl: Positions that lose their content, drawn with probability gamma * sigma_t.
    """
    z_t = alpha[..., None] * (z_0 - m_z) + sigma[..., None] * epsilon + m_z
    return torch.where(replaced_bl[..., None], m_z, z_t)
