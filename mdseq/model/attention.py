"""Multi-head self-attention over a sparse pattern, with rotary positions.

Shapes: b batch, s slots (global, then tokens), d hidden dimension, h heads, e head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdseq.kernels import rotate, split_linear
from mdseq.sparse import Layout, Pattern, attend


class Projections(nn.Linear):
    """Queries, keys and values of one input."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim, 3 * hidden_dim, bias=False)

    def forward(self, x_bsd: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return split_linear(x_bsd, self.weight, 3)


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(e)) V over the keys that the layer's pattern makes visible."""

    def __init__(self, hidden_dim: int, num_heads: int, pattern: Pattern, engine: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pattern = pattern
        self.engine = engine
        self.query_key_value = Projections(hidden_dim)
        self.output = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x_bsd: Tensor, angles: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        heads = (*x_bsd.shape[:2], self.num_heads, -1)
        q_bshe, k_bshe, v_bshe = (out_bsd.view(heads) for out_bsd in self.query_key_value(x_bsd))
        q_bshe, k_bshe = rotate(q_bshe, angles), rotate(k_bshe, angles)
        out_bshe = attend(q_bshe, k_bshe, v_bshe, self.pattern, layout, self.engine)
        return self.output(out_bshe.flatten(2))
