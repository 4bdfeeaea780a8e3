"""Attention in time and memory linear in the row's length, exact, on any device.

A dilated window is a dense window over every d-th token, so tokens are first regrouped by their residue modulo the
dilation. Then each block of queries meets its own block of keys, the blocks on either side, and the global keys of the
row. Global queries, which are few, meet every slot.

Shapes: b batch, s slots, g global slots, l tokens, h heads, e head dimension, r residues (= dilation), n blocks,
c block length, k keys that a block of queries meets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdseq.sparse.documents import NO_DOCUMENT, Layout
from mdseq.sparse.pattern import Pattern

MIN_BLOCK = 32


@dataclass(frozen=True)
class BandedPlan:
    """How tokens fall into blocks, and who sees whom; the same for all layers of one pattern.

    Attributes:
        block: Tokens of a block (c); at least the window, so that the neighbouring blocks hold all of it.
        mask_xck: Visible keys of each query, x = b * r * n blocks. A slot without a document sees itself, which
            keeps softmax finite; its output is set to zero afterwards.
        global_mask_bgs: Slots that each global query sees.
    """

    block: int
    mask_xck: Tensor
    global_mask_bgs: Tensor


def attend_banded(q_bshe: Tensor, k_bshe: Tensor, v_bshe: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    outs = [_attend_group(q_bshe[:, :, h], k_bshe[:, :, h], v_bshe[:, :, h], pattern, d, layout) for h, d in pattern.groups(q_bshe.shape[2])]
    return torch.cat(outs, dim=2)


def _attend_group(q_bshe: Tensor, k_bshe: Tensor, v_bshe: Tensor, pattern: Pattern, dilation: int, layout: Layout) -> Tensor:
    if pattern.window is None:
        mask_bss = layout.plan("full", lambda: _see_documents(layout.document_bs, layout.document_bs))
        return _mask_padding(_attend_masked(q_bshe, k_bshe, v_bshe, mask_bss), layout)

    plan = layout.plan(("banded", pattern.window, dilation), lambda: build_plan(pattern, dilation, layout))
    g = layout.num_global
    q_x, k_x, v_x = (_to_blocks(x_bshe[:, g:], dilation, plan.block) for x_bshe in (q_bshe, k_bshe, v_bshe))
    k_x, v_x = _with_neighbours(k_x), _with_neighbours(v_x)
    if g:
        k_x = torch.cat([_repeat_globals(k_bshe[:, :g], k_x), k_x], dim=4)
        v_x = torch.cat([_repeat_globals(v_bshe[:, :g], v_x), v_x], dim=4)
    out_x = F.scaled_dot_product_attention(
        q_x.flatten(0, 2), k_x.flatten(0, 2), v_x.flatten(0, 2), attn_mask=plan.mask_xck[:, None]
    )
    out_blhe = _from_blocks(out_x.view(q_x.shape), q_bshe.shape[1] - g)
    if g:
        out_bghe = _attend_masked(q_bshe[:, :g], k_bshe, v_bshe, plan.global_mask_bgs)
        out_blhe = torch.cat([out_bghe, out_blhe], dim=1)
    return _mask_padding(out_blhe, layout)


def build_plan(pattern: Pattern, dilation: int, layout: Layout) -> BandedPlan:
    """Cut the layout's tokens into blocks and draw the mask of each."""
    assert pattern.window is not None
    g, r = layout.num_global, dilation
    global_bg, document_bl = layout.document_bs[:, :g], layout.document_bs[:, g:]
    block = max(pattern.window, MIN_BLOCK)
    blocks_brnhce = _to_blocks(document_bl[:, :, None, None], r, block, fill=NO_DOCUMENT)
    key_blocks_brnhke = _with_neighbours(blocks_brnhce, fill=NO_DOCUMENT)
    document_brnc, key_document_brnk = blocks_brnhce[:, :, :, 0, :, 0], key_blocks_brnhke[:, :, :, 0, :, 0]

    query_c = torch.arange(block, device=document_bl.device) + block
    key_k = torch.arange(3 * block, device=document_bl.device)
    distance_ck = (query_c[:, None] - key_k[None, :]).abs()
    mask_brnck = _see_documents(document_brnc, key_document_brnk, is_self=distance_ck == 0)
    mask_brnck = mask_brnck & (distance_ck <= pattern.window)
    if g:
        owner_brng = global_bg[:, None, None, :].expand(*document_brnc.shape[:3], g)
        nothing_cg = torch.zeros(block, g, dtype=torch.bool, device=document_bl.device)
        mask_brncg = _see_documents(document_brnc, owner_brng, is_self=nothing_cg)
        mask_brnck = torch.cat([mask_brncg, mask_brnck], dim=-1)
    global_mask_bgs = _see_documents(layout.document_bs, layout.document_bs)[:, :g]
    return BandedPlan(block, mask_brnck.flatten(0, 2), global_mask_bgs)


def _see_documents(query_document: Tensor, key_document: Tensor, is_self: Tensor | None = None) -> Tensor:
    """Keys of the query's own document, [..., q, k]; where there is no document, the slot itself."""
    if is_self is None:
        is_self = torch.eye(query_document.shape[-1], dtype=torch.bool, device=query_document.device)
    same = query_document[..., :, None] == key_document[..., None, :]
    real = (query_document != NO_DOCUMENT)[..., :, None]
    return torch.where(real, same, is_self)


def _attend_masked(q_bqhe: Tensor, k_bkhe: Tensor, v_bkhe: Tensor, mask_bqk: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_bqhe, k_bkhe, v_bkhe))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_bqk[:, None]).transpose(1, 2)


def _mask_padding(out_bshe: Tensor, layout: Layout) -> Tensor:
    return out_bshe.masked_fill(~layout.real_bs[:, :, None, None], 0.0)


def _to_blocks(x_blhe: Tensor, dilation: int, block: int, fill: int = 0) -> Tensor:
    """[b, l, h, e] -> [b, r, n, h, c, e], filled up at the end."""
    b, length, h, e = x_blhe.shape
    x = F.pad(x_blhe, (0, 0, 0, 0, 0, -length % (dilation * block)), value=fill)
    return x.reshape(b, -1, block, dilation, h, e).permute(0, 3, 1, 4, 2, 5)


def _from_blocks(x_brnhce: Tensor, length: int) -> Tensor:
    """The inverse of `_to_blocks`."""
    b, _, _, h, _, e = x_brnhce.shape
    return x_brnhce.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, h, e)[:, :length]


def _with_neighbours(x_brnhce: Tensor, fill: int = 0) -> Tensor:
    """Each block with the ones before and after it: [b, r, n, h, 3c, e]; `fill` beyond the ends."""
    x = F.pad(x_brnhce, (0, 0, 0, 0, 0, 0, 1, 1), value=fill)
    return torch.cat([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], dim=4)


def _repeat_globals(x_bghe: Tensor, like_brnhke: Tensor) -> Tensor:
    """The row's global keys for each of its blocks: [b, r, n, h, g, e]."""
    b, r, n, h, _, e = like_brnhke.shape
    return x_bghe.transpose(1, 2)[:, None, None].expand(b, r, n, h, x_bghe.shape[1], e)
