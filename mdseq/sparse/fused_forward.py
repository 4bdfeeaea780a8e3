# mypy: ignore-errors
"""Triton kernels of the fused engine: output and lse.

Softmax is in base 2, exp(x) = exp2(x * log2(e)), and `lse` too holds binary logarithms; inf for rows that meet nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mdseq.sparse.fused_tile import (
    VARYING,
    VARYING_OF_PARTS,
    global_range,
    load_part,
    load_rows,
    rows_of,
    sees,
    tile_of,
)


@triton.jit
def _forward_range(
    q, k, v, stride_ks, stride_vs, begin, end, last, first, stop, scale, top, total, out,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys `begin` to `end`, a block at a time; no key from `last` on is read."""
    for start in tl.range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        key = load_rows(rows_of(k, start, stride_ks, BLOCK, WIDTH), position < last, MASKED)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            score = tl.where(sees(first, stop, position), score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        # Of rows that have met nothing yet, -inf: any number will do in its place.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
        weight = tl.exp2(score * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weight, 1)
        value = load_rows(rows_of(v, start, stride_vs, BLOCK, WIDTH), position < last, MASKED)
        out = tl.dot(weight.to(value.dtype), value, out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, out


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, ranges,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_op, stride_os, stride_oh, stride_lb, stride_lp, stride_lh,
    num_slots, num_global, first_head, group_heads, dilation, window, pieces, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GLOBAL_BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    IS_GLOBAL: tl.constexpr, HAS_GLOBAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of queries, over one piece of the tokens that they meet, and in the first piece over
    their global slots."""
    batch, head, piece, start, slot, exists, class_slot, class_token, first, stop, begin, full, full_end, end = tile_of(
        ranges, num_slots, num_global, first_head, group_heads, dilation, window, pieces, ROWS, BLOCK, IS_GLOBAL
    )
    ranges += batch * 4 * num_slots

    q += batch * stride_qb + head * stride_qh + class_slot * stride_qs
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    query = tl.load(rows_of(q, start, dilation * stride_qs, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)

    class_k = k + class_token * stride_ks
    class_v = v + class_token * stride_vs
    step_k, step_v = dilation * stride_ks, dilation * stride_vs
    if not IS_GLOBAL:
        top, total, acc = _forward_range(
            query, class_k, class_v, step_k, step_v, begin, full, end, first, stop, scale, top, total, acc,
            BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip
        top, total, acc = _forward_range(
            query, class_k, class_v, step_k, step_v, full, full_end, end, first, stop, scale, top, total, acc,
            BLOCK, WIDTH, False, PRECISION,
        )  # fmt: skip
        begin = full_end
    top, total, acc = _forward_range(
        query, class_k, class_v, step_k, step_v, begin, end, end, first, stop, scale, top, total, acc,
        BLOCK, WIDTH, True, PRECISION,
    )  # fmt: skip

    if HAS_GLOBAL:
        first, stop, begin, end = global_range(ranges, num_slots, slot, exists & (piece == 0))
        top, total, acc = _forward_range(
            query, k, v, stride_ks, stride_vs, begin, end, end, first, stop, scale, top, total, acc,
            GLOBAL_BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    out += batch * stride_ob + piece * stride_op + head * stride_oh + class_slot * stride_os
    lse += batch * stride_lb + piece * stride_lp + head * stride_lh
    out_rows = rows_of(out, start, dilation * stride_os, ROWS, WIDTH)
    tl.store(out_rows, acc.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + slot, tl.where(nothing, float("inf"), top + tl.log2(total)), mask=exists)


@triton.jit(do_not_specialize=VARYING_OF_PARTS)
def merge_kernel(
    part, part_lse, out, lse, stride_ob, stride_os, stride_oh, stride_lb, stride_lh, num_global, num_heads, pieces,
    PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Output and lse of one global slot in one head, from those over its pieces, [b, p, g, h, d] and [b, p, h, g]."""
    index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    piece = tl.arange(0, PIECES)
    row = batch * pieces + piece
    lse_p = tl.load(part_lse + (row * num_heads + head) * num_global + index, mask=piece < pieces, other=float("inf"))
    lse_p = tl.where(lse_p == float("inf"), -float("inf"), lse_p)
    out_pd = load_part(part, row, piece < pieces, index, head, num_global, num_heads, WIDTH)
    top = tl.max(lse_p, 0)
    weight_p = tl.exp2(lse_p - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight_p, 0)
    nothing = total == 0.0
    out_d = tl.sum(out_pd * weight_p[:, None], 0) / tl.where(nothing, 1.0, total)
    out += batch * stride_ob + index * stride_os + head * stride_oh
    tl.store(out + tl.arange(0, WIDTH), out_d.to(out.dtype.element_ty))
    lse += batch * stride_lb + head * stride_lh
    tl.store(lse + index, tl.where(nothing, float("inf"), top + tl.log2(total)))
