"""Attention by FlexAttention, compiled: for GPUs and types that the flash kernel does not know, and to compare with.

Tokens are laid out residue class after residue class, so that the keys of a dilated window stand side by side, in few
blocks. Two numbers per row say all about the mask: its document, and its coordinate, in which classes are further apart
than the window. As they are tensors, neither new documents nor another window compile anything anew.

Shapes: b batch, s slots, h heads, d head dimension, n rows (slots in their new order, filled up), x blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mdseq.sparse.documents import NO_DOCUMENT, Layout
from mdseq.sparse.pattern import Pattern

BLOCK = 128
MAX_SHAPES = 256  # with and without gradient, by heads, batch, type: more than the 8 after which torch gives up
AT_GLOBAL = -1  # the coordinate of rows that every row of their document sees, and that see it


def attend_flex(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    outputs = []
    for heads, dilation in pattern.groups(q_bshd.shape[2]):
        stride = 1 if pattern.window is None else dilation
        key = ("flex", pattern.window, stride)
        plan = layout.plan(key, lambda stride=stride: FlexPlan.of(pattern.window, stride, layout))  # type: ignore[misc]
        q, k, v = (plan.order.to_rows(x[:, :, heads]).transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            out_bhnd = _compiled()(q, k, v, block_mask=plan.mask)
        outputs.append(plan.order.to_slots(out_bhnd.transpose(1, 2)))
    out_bshd = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out_bshd.masked_fill(~layout.real_bs[:, :, None, None], 0.0)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True)


@dataclass(frozen=True)
class RowOrder:
    """Global slots, then the tokens, class after class, then filling.

    Attributes:
        num_global: g.
        num_tokens: Tokens of a row (t).
        dilation: Residue classes.
        num_rows: n, in coarse steps, so that rows of similar lengths share what was compiled.
    """

    num_global: int
    num_tokens: int
    dilation: int
    num_rows: int

    @classmethod
    def of(cls, layout: Layout, dilation: int) -> RowOrder:
        num_tokens = layout.document_bs.shape[1] - layout.num_global
        used = layout.num_global + -(-num_tokens // dilation) * dilation
        step = max(BLOCK, 1 << max(used.bit_length() - 4, 0))  # at most an eighth is filling
        return cls(layout.num_global, num_tokens, dilation, -(-used // step) * step)

    def to_rows(self, x_bshd: Tensor, fill: int = 0) -> Tensor:
        """[b, s, h, d] -> [b, n, h, d]."""
        global_bghd, token_bthd = x_bshd[:, : self.num_global], x_bshd[:, self.num_global :]
        token_bthd = F.pad(token_bthd, (0, 0, 0, 0, 0, -self.num_tokens % self.dilation), value=fill)
        by_class = token_bthd.unflatten(1, (-1, self.dilation)).transpose(1, 2).flatten(1, 2)
        x_bnhd = torch.cat([global_bghd, by_class], dim=1)
        return F.pad(x_bnhd, (0, 0, 0, 0, 0, self.num_rows - x_bnhd.shape[1]), value=fill)

    def to_slots(self, x_bnhd: Tensor) -> Tensor:
        """[b, n, h, d] -> [b, s, h, d]."""
        length = -(-self.num_tokens // self.dilation)
        global_bghd, by_class, _ = x_bnhd.tensor_split((self.num_global, self.num_global + length * self.dilation), 1)
        token_bthd = by_class.unflatten(1, (self.dilation, length)).transpose(1, 2).flatten(1, 2)
        return torch.cat([global_bghd, token_bthd[:, : self.num_tokens]], dim=1)


@dataclass(frozen=True)
class FlexPlan:
    order: RowOrder
    mask: BlockMask

    @classmethod
    def of(cls, window: int | None, dilation: int, layout: Layout) -> FlexPlan:
        order = RowOrder.of(layout, dilation)
        document_bn = order.to_rows(layout.document_bs[..., None, None], fill=NO_DOCUMENT)[..., 0, 0].int().contiguous()
        device = document_bn.device
        length = max(-(-order.num_tokens // dilation), 1)
        reach = length if window is None else min(window, length)
        token_n = torch.arange(order.num_rows, device=device) - order.num_global
        # Within a class from one token to the next by 1, to the next class by more than any window.
        coordinate_n = token_n + token_n // length * reach
        coordinate_n = torch.where(token_n < 0, AT_GLOBAL, coordinate_n).int()
        reach_1 = torch.full((1,), reach, dtype=torch.int32, device=device)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at_q, at_k = coordinate_n[q], coordinate_n[k]
            near = (at_q == AT_GLOBAL) | (at_k == AT_GLOBAL) | ((at_q - at_k).abs() <= reach_1[0])
            document = document_bn[b, q]
            return (document == document_bn[b, k]) & (document != NO_DOCUMENT) & near

        some_bxx, all_bxx = _block_visibility(document_bn, coordinate_n, reach)
        partial, full = _listed(some_bxx & ~all_bxx), _listed(all_bxx)
        mask = BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees)
        return cls(order, mask)


def _block_visibility(document_bn: Tensor, coordinate_n: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Pairs of blocks of which some row may see another, and of which all surely do; bool [b, x, x].

    Judged by the smallest and largest document and coordinate of a block.
    """
    document_bxn, coordinate_xn = document_bn.unflatten(1, (-1, BLOCK)), coordinate_n.unflatten(0, (-1, BLOCK))
    real_bxn = document_bxn != NO_DOCUMENT
    first_bx = document_bxn.masked_fill(~real_bxn, torch.iinfo(torch.int32).max).amin(-1)
    last_bx = document_bxn.amax(-1)
    one_bx = real_bxn.all(-1) & (first_bx == last_bx)
    overlap_bxx = (first_bx[:, :, None] <= last_bx[:, None, :]) & (first_bx[:, None, :] <= last_bx[:, :, None])
    same_bxx = one_bx[:, :, None] & one_bx[:, None, :] & overlap_bxx

    is_global_xn = coordinate_xn == AT_GLOBAL
    some_global_x, only_global_x = is_global_xn.any(-1), is_global_xn.all(-1)
    low_x = coordinate_xn.masked_fill(is_global_xn, torch.iinfo(torch.int32).max).amin(-1)
    high_x = coordinate_xn.amax(-1)
    gap_xx = torch.maximum(low_x[:, None] - high_x[None, :], low_x[None, :] - high_x[:, None])
    span_xx = torch.maximum(high_x[:, None], high_x[None, :]) - torch.minimum(low_x[:, None], low_x[None, :])
    some_near_xx = (gap_xx <= reach) | some_global_x[:, None] | some_global_x[None, :]
    all_near_xx = (span_xx <= reach) & ~some_global_x[:, None] & ~some_global_x[None, :]
    all_near_xx = all_near_xx | only_global_x[:, None] | only_global_x[None, :]
    return overlap_bxx & some_near_xx, same_bxx & all_near_xx


def _listed(visible_bxx: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries meets, and which, with the rest behind: [b, 1, x] and [b, 1, x, x]."""
    order_bxx = visible_bxx.int().argsort(dim=-1, descending=True, stable=True)
    return visible_bxx.sum(-1, dtype=torch.int32)[:, None], order_bxx.int()[:, None].contiguous()
