"""One layer of the denoiser: attention, then a feed-forward layer, each with norm and residual."""

from __future__ import annotations

from torch import Tensor, nn

from mdseq.model.attention import SelfAttention
from mdseq.model.dropout import ATTENTION, FEEDFORWARD, Dropout
from mdseq.sparse import Layout


class Block(nn.Module):
    """Pre-norm: x + sublayer(norm(x)). Post-norm (as published): norm(x + sublayer(x)). Dropout is of the sublayer."""

    def __init__(self, hidden_dim: int, attention: SelfAttention, feedforward: nn.Module, *, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention = attention
        self.attention_norm = nn.RMSNorm(hidden_dim, eps=1e-5)
        self.feedforward = feedforward
        self.feedforward_norm = nn.RMSNorm(hidden_dim, eps=1e-5)

    def forward(
        self, x_bsd: Tensor, angles: tuple[Tensor, Tensor], layout: Layout, dropout: Dropout | None = None
    ) -> Tensor:
        def add(residual_bsd: Tensor, out_bsd: Tensor, sublayer: int) -> Tensor:
            return residual_bsd + out_bsd if dropout is None else dropout.add(residual_bsd, out_bsd, layout, sublayer)

        if self.post_norm:
            x_bsd = self.attention_norm(add(x_bsd, self.attention(x_bsd, angles, layout), ATTENTION))
            return self.feedforward_norm(add(x_bsd, self.feedforward(x_bsd), FEEDFORWARD))
        x_bsd = add(x_bsd, self.attention(self.attention_norm(x_bsd), angles, layout), ATTENTION)
        return add(x_bsd, self.feedforward(self.feedforward_norm(x_bsd)), FEEDFORWARD)
