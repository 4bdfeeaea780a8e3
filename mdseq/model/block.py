"""One layer of the denoiser: attention, then a feed-forward layer, each with norm and residual."""

from __future__ import annotations

from torch import Tensor, nn

from mdseq.model.attention import SelfAttention
from mdseq.sparse import Layout


class Block(nn.Module):
    """Pre-norm: x + sublayer(norm(x)). Post-norm (as published): norm(x + sublayer(x))."""

    def __init__(self, hidden_dim: int, attention: SelfAttention, feedforward: nn.Module, *, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention = attention
        self.attention_norm = nn.RMSNorm(hidden_dim, eps=1e-5)
        self.feedforward = feedforward
        self.feedforward_norm = nn.RMSNorm(hidden_dim, eps=1e-5)

    def forward(self, x_bsd: Tensor, angles: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        if self.post_norm:
            x_bsd = self.attention_norm(x_bsd + self.attention(x_bsd, angles, layout))
            return self.feedforward_norm(x_bsd + self.feedforward(x_bsd))
        x_bsd = x_bsd + self.attention(self.attention_norm(x_bsd), angles, layout)
        return x_bsd + self.feedforward(self.feedforward_norm(x_bsd))
