"""Attention by its definition: dense, in float64. The oracle that every engine is compared with.

Shapes: b batch, s slots (q queries, k keys), h heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.sparse.documents import NO_DOCUMENT, Layout
from mdseq.sparse.pattern import Pattern


def visible(pattern: Pattern, layout: Layout, dilation: int) -> Tensor:
    """The mask of the heads of one dilation, bool [b, q, k]: True where slot q may attend to slot k."""
    document_bs = layout.document_bs
    same_bqk = (document_bs[:, :, None] == document_bs[:, None, :]) & (document_bs != NO_DOCUMENT)[:, :, None]
    if pattern.window is None:
        return same_bqk
    slot_s = torch.arange(document_bs.shape[1], device=document_bs.device)
    distance_qk = (slot_s[:, None] - slot_s[None, :]).abs()
    window_qk = (distance_qk <= pattern.window * dilation) & (distance_qk % dilation == 0)
    global_s = slot_s < layout.num_global
    return same_bqk & (window_qk | global_s[:, None] | global_s[None, :])


def attend_reference(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the visible keys; zero where none is visible."""
    groups = pattern.groups(q_bshd.shape[2])
    outputs = [
        _attend(q_bshd[:, :, heads], k_bshd[:, :, heads], v_bshd[:, :, heads], visible(pattern, layout, dilation))
        for heads, dilation in groups
    ]
    return torch.cat(outputs, dim=2)


def _attend(q_bqhd: Tensor, k_bkhd: Tensor, v_bkhd: Tensor, mask_bqk: Tensor) -> Tensor:
    q, k, v = (x.to(torch.float64) for x in (q_bqhd, k_bkhd, v_bkhd))
    score_bhqk = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    score_bhqk = score_bhqk.masked_fill(~mask_bqk[:, None], -torch.inf)
    # A finite row keeps softmax, and its gradient, free of NaN where nothing is visible.
    nothing_bq = ~mask_bqk.any(dim=-1)
    score_bhqk = score_bhqk.masked_fill(nothing_bq[:, None, :, None], 0.0)
    weight_bhqk = score_bhqk.softmax(dim=-1).masked_fill(nothing_bq[:, None, :, None], 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weight_bhqk, v).to(q_bqhd.dtype)
