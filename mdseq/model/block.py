"""One layer of the denoiser: attention, then a feed-forward layer, each with norm and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdseq.kernels import add_norm
from mdseq.model.attention import SelfAttention
from mdseq.model.dropout import ATTENTION, FEEDFORWARD, Dropout
from mdseq.sparse import Layout


class AddNorm(nn.Module):
    """x + added, and its RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_bsd: Tensor, added_bsd: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_norm(x_bsd, added_bsd, self.weight, eps=1e-5)


class Block(nn.Module):
    """Pre-norm: x + sublayer(norm(x)). Post-norm (as published): norm(x + sublayer(x)). Dropout is of the sublayer."""

    def __init__(self, hidden_dim: int, attention: SelfAttention, feedforward: nn.Module, *, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention = attention
        self.attention_norm = AddNorm(hidden_dim)
        self.feedforward = feedforward
        self.feedforward_norm = AddNorm(hidden_dim)

    def forward(
        self, x_bsd: Tensor, angles: tuple[Tensor, Tensor], layout: Layout, dropout: Dropout | None = None
    ) -> Tensor:
        def added(out_bsd: Tensor, sublayer: int) -> tuple[Tensor, Tensor | None]:
            """What the next norm is of: a sum that it is left to, or that dropout has made already."""
            if dropout is None:
                return x_bsd, out_bsd
            return dropout.add(x_bsd, out_bsd, layout, sublayer), None

        if self.post_norm:
            _, x_bsd = self.attention_norm(*added(self.attention(x_bsd, angles, layout), ATTENTION))
            _, x_bsd = self.feedforward_norm(*added(self.feedforward(x_bsd), FEEDFORWARD))
            return x_bsd
        x_bsd, normed_bsd = self.attention_norm(x_bsd)
        x_bsd, normed_bsd = self.feedforward_norm(*added(self.attention(normed_bsd, angles, layout), ATTENTION))
        x_bsd, out_bsd = added(self.feedforward(normed_bsd), FEEDFORWARD)
        return x_bsd if out_bsd is None else x_bsd + out_bsd
