"""Multi-head self-attention over a sparse pattern, with rotary positions.

Shapes: b batch, s slots (global, then tokens), d hidden dimension, h heads, e head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdseq.kernels import rotate
from mdseq.sparse import Layout, Pattern, attend


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(e)) V over the keys that the layer's pattern makes visible."""

    def __init__(self, hidden_dim: int, num_heads: int, pattern: Pattern, engine: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pattern = pattern
        self.engine = engine
        self.query = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.key = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.value = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x_bsd: Tensor, angles: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        heads = (*x_bsd.shape[:2], self.num_heads, -1)
        q_bshe = rotate(self.query(x_bsd).view(heads), angles)
        k_bshe = rotate(self.key(x_bsd).view(heads), angles)
        v_bshe = self.value(x_bsd).view(heads)
        out_bshe = attend(q_bshe, k_bshe, v_bshe, self.pattern, layout, self.engine)
        return self.output(out_bshe.flatten(2))
