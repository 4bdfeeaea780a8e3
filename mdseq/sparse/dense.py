"""All pairs of a row under a mask: quadratic, and fastest where rows are so short that nothing is worth leaving out.

Shapes: b batch, s slots (q queries, k keys), h heads, d head dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mdseq.sparse.documents import Layout
from mdseq.sparse.pattern import Pattern
from mdseq.sparse.reference import visible


def attend_dense(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """See `mdseq.sparse.attend`."""
    mask_bhqk = layout.plan(("dense", pattern), partial(_mask, pattern, layout))
    if mask_bhqk.shape[1] > 1:
        mask_bhqk = mask_bhqk.repeat_interleave(q_bshd.shape[2] // mask_bhqk.shape[1], dim=1)
    q, k, v = (x_bshd.transpose(1, 2) for x_bshd in (q_bshd, k_bshd, v_bshd))
    out_bshd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_bhqk).transpose(1, 2)
    return out_bshd.masked_fill(~layout.real_bs[:, :, None, None], 0.0)


def _mask(pattern: Pattern, layout: Layout) -> Tensor:
    """Of each group of heads; a slot that holds nothing sees everything, which keeps softmax finite."""
    dilations = (1,) if pattern.window is None else pattern.dilations
    masks = [visible(pattern, layout, dilation) | ~layout.real_bs[:, :, None] for dilation in dilations]
    return torch.stack(masks, dim=1)
