"""Attention over several sets of keys, put together from the attention over each (FlashAttention, arXiv 2205.14135).

Every part brings its output and the log of its softmax's denominator ("lse"); -inf where a query meets no key, whose
output is then zero.

Shapes: n rows, h heads, d head dimension, c parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_two(out_nhd: Tensor, lse_hn: Tensor, other_nhd: Tensor, other_lse_hn: Tensor) -> tuple[Tensor, Tensor]:
    """The output and lse over both sets of keys. Linear in memory traffic: nothing is held in a wider type."""
    total_hn = torch.logaddexp(lse_hn, other_lse_hn)
    share_hn = _share(other_lse_hn, total_hn)
    return torch.lerp(out_nhd, other_nhd, share_hn.t()[..., None].to(out_nhd.dtype)), total_hn


def merge_many(out_nchd: Tensor, lse_hnc: Tensor) -> tuple[Tensor, Tensor]:
    """The output [n, h, d] and lse [h, n] over c sets of keys, summed in the type of lse."""
    total_hn = lse_hnc.logsumexp(dim=-1)
    share_hnc = _share(lse_hnc, total_hn[..., None])
    out_nhd = torch.einsum("hnc,nchd->nhd", share_hnc, out_nchd.to(lse_hnc.dtype))
    return out_nhd.to(out_nchd.dtype), total_hn


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """Weight of a part in the whole; of nothing, 0 (where -inf - -inf gives NaN)."""
    return torch.exp(lse - total).nan_to_num(nan=0.0)
