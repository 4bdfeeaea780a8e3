"""What attention costs, exactly: the pairs of a query and a key that a pattern makes visible.

By arithmetic on the documents' lengths, so that it takes a moment for rows of any length.

Shapes: b batch, m documents in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.sparse.documents import Layout
from mdseq.sparse.pattern import Pattern

# Flash kernels make two matrix products forward (q k^T and p v), and five backward, the first of them once more. That
# is the convention of their publications (FlashAttention-2, arXiv 2307.08691, section 4.1).
BACKWARD_TO_FORWARD = 2.5


def visible_pairs(pattern: Pattern, layout: Layout, num_heads: int) -> Tensor:
    """Visible (query, key) pairs of each row, summed over the heads: int64 [b].

    Raises:
        ValueError: If the heads cannot be shared out among the pattern's dilations.
    """
    tokens_bm = _slots_of_documents(layout.document_bs[:, layout.num_global :], layout.num_documents)
    globals_bm = _slots_of_documents(layout.document_bs[:, : layout.num_global], layout.num_documents)
    if pattern.window is None:
        return num_heads * (tokens_bm + globals_bm).square().sum(dim=1)
    with_globals_bm = globals_bm * (2 * tokens_bm + globals_bm)  # global rows, and global columns of the others
    pairs_b = num_heads * with_globals_bm.sum(dim=1)
    for heads, dilation in pattern.groups(num_heads):
        pairs_b += (heads.stop - heads.start) * _window_pairs(tokens_bm, pattern.window, dilation).sum(dim=1)
    return pairs_b


def forward_flops(pairs: int, head_dim: int) -> int:
    """Floating-point operations of attention without its projections: two products of 2 * head_dim each a pair.

    Those of the backward pass are BACKWARD_TO_FORWARD times as many.
    """
    return 4 * head_dim * pairs


def _window_pairs(tokens_bm: Tensor, window: int, dilation: int) -> Tensor:
    """n + 2 sum_j (n - j d) over the j = 1 .. w for which the term is positive."""
    steps_bm = ((tokens_bm - 1).clamp(min=0) // dilation).clamp(max=window)
    return tokens_bm + steps_bm * (2 * tokens_bm - dilation * (steps_bm + 1))


def _slots_of_documents(document_bs: Tensor, num_documents: int) -> Tensor:
    real_bs = document_bs >= 0
    count_bm = torch.zeros(len(document_bs), num_documents, dtype=torch.long, device=document_bs.device)
    return count_bm.scatter_add_(1, document_bs.clamp(min=0), real_bs.long())
