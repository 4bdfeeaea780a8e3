# mypy: ignore-errors
"""Triton kernels of the fused engine: gradients (FlashAttention-2, arXiv 2307.08691, section 2.3.2).

With P = exp2(S - lse), dO the gradient of the output O and delta = rowsum(dO * O): dV = P^T dO,
dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q. A row whose lse is inf has P = 0.
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
def _query_gradient_range(
    query, grad, k, v, stride_ks, stride_vs, begin, end, last, first, stop, scale, lse, delta, grad_q,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q plus dS K over keys `begin` to `end`, where dS = P * (dO V^T - delta)."""
    for start in tl.range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        key = load_rows(rows_of(k, start, stride_ks, BLOCK, WIDTH), position < last, MASKED)
        value = load_rows(rows_of(v, start, stride_vs, BLOCK, WIDTH), position < last, MASKED)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        weight = tl.exp2(score * scale - lse[:, None])
        if MASKED:
            weight = tl.where(sees(first, stop, position), weight, 0.0)
        grad_weight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_score = weight * (grad_weight - delta[:, None])
        grad_q = tl.dot(grad_score.to(key.dtype), key, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q, k, v, out, grad_out, lse, delta, grad_q, ranges,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    stride_db, stride_dp, stride_ds, stride_dh, stride_lb, stride_lh,
    num_slots, num_global, first_head, group_heads, dilation, window, pieces, scale, natural_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GLOBAL_BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    IS_GLOBAL: tl.constexpr, HAS_GLOBAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, as `forward_kernel` walks it; and delta = rowsum(dO * O) on the way."""
    batch, head, piece, start, slot, exists, class_slot, class_token, first, stop, begin, full, full_end, end = tile_of(
        ranges, num_slots, num_global, first_head, group_heads, dilation, window, pieces, ROWS, BLOCK, IS_GLOBAL
    )
    ranges += batch * 4 * num_slots

    q += batch * stride_qb + head * stride_qh + class_slot * stride_qs
    out += batch * stride_ob + head * stride_oh + class_slot * stride_os
    grad_out += batch * stride_gb + head * stride_gh + class_slot * stride_gs
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    lse += batch * stride_lb + head * stride_lh
    delta += batch * stride_lb + head * stride_lh
    grad = tl.load(rows_of(grad_out, start, dilation * stride_gs, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    answer = tl.load(rows_of(out, start, dilation * stride_os, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    row_delta = tl.sum(grad.to(tl.float32) * answer.to(tl.float32), 1)
    tl.store(delta + slot, row_delta, mask=exists & (piece == 0))
    query = tl.load(rows_of(q, start, dilation * stride_qs, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    row_lse = tl.load(lse + slot, mask=exists, other=float("inf"))
    acc = tl.zeros([ROWS, WIDTH], tl.float32)

    class_k = k + class_token * stride_ks
    class_v = v + class_token * stride_vs
    step_k, step_v = dilation * stride_ks, dilation * stride_vs
    if not IS_GLOBAL:
        acc = _query_gradient_range(
            query, grad, class_k, class_v, step_k, step_v, begin, full, end, first, stop, scale, row_lse, row_delta,
            acc, BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip
        acc = _query_gradient_range(
            query, grad, class_k, class_v, step_k, step_v, full, full_end, end, first, stop, scale, row_lse, row_delta,
            acc, BLOCK, WIDTH, False, PRECISION,
        )  # fmt: skip
        begin = full_end
    acc = _query_gradient_range(
        query, grad, class_k, class_v, step_k, step_v, begin, end, end, first, stop, scale, row_lse, row_delta,
        acc, BLOCK, WIDTH, True, PRECISION,
    )  # fmt: skip

    if HAS_GLOBAL:
        first, stop, begin, end = global_range(ranges, num_slots, slot, exists & (piece == 0))
        acc = _query_gradient_range(
            query, grad, k, v, stride_ks, stride_vs, begin, end, end, first, stop, scale, row_lse, row_delta,
            acc, GLOBAL_BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip

    grad_q += batch * stride_db + piece * stride_dp + head * stride_dh + class_slot * stride_ds
    grad_rows = rows_of(grad_q, start, dilation * stride_ds, ROWS, WIDTH)
    tl.store(grad_rows, (acc * natural_scale).to(grad_q.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _key_gradient_range(
    key, value, q, grad_out, lse, delta, stride_qs, stride_gs, stride_ls, begin, end, last, first, stop, scale,
    grad_k, grad_v,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k plus dS^T Q, and grad_v plus P^T dO, over queries `begin` to `end`."""
    for start in tl.range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        query = load_rows(rows_of(q, start, stride_qs, BLOCK, WIDTH), position < last, MASKED)
        grad = load_rows(rows_of(grad_out, start, stride_gs, BLOCK, WIDTH), position < last, MASKED)
        if MASKED:
            row_lse = tl.load(lse + position * stride_ls, mask=position < last, other=float("inf"))
            row_delta = tl.load(delta + position * stride_ls, mask=position < last, other=0.0)
        else:
            row_lse = tl.load(lse + position * stride_ls)
            row_delta = tl.load(delta + position * stride_ls)
        score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        weight = tl.exp2(score * scale - row_lse[None, :])
        if MASKED:
            weight = tl.where(sees(first, stop, position), weight, 0.0)
        grad_v = tl.dot(weight.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_score = weight * (grad_weight - row_delta[None, :])
        grad_k = tl.dot(grad_score.to(query.dtype), query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, ranges,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_db, stride_dp, stride_ds, stride_dh, stride_lb, stride_lh,
    num_slots, num_global, first_head, group_heads, dilation, window, pieces, scale, natural_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GLOBAL_BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    IS_GLOBAL: tl.constexpr, HAS_GLOBAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, over one piece of the tokens that they meet, and in the first piece
    over their global slots."""
    batch, head, piece, start, slot, exists, class_slot, class_token, first, stop, begin, full, full_end, end = tile_of(
        ranges, num_slots, num_global, first_head, group_heads, dilation, window, pieces, ROWS, BLOCK, IS_GLOBAL
    )
    ranges += batch * 4 * num_slots

    k += batch * stride_kb + head * stride_kh + class_slot * stride_ks
    v += batch * stride_vb + head * stride_vh + class_slot * stride_vs
    q += batch * stride_qb + head * stride_qh
    grad_out += batch * stride_gb + head * stride_gh
    lse += batch * stride_lb + head * stride_lh
    delta += batch * stride_lb + head * stride_lh
    key = tl.load(rows_of(k, start, dilation * stride_ks, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    value = tl.load(rows_of(v, start, dilation * stride_vs, ROWS, WIDTH), mask=exists[:, None], other=0.0)
    acc_k = tl.zeros([ROWS, WIDTH], tl.float32)
    acc_v = tl.zeros([ROWS, WIDTH], tl.float32)

    class_q, class_grad = q + class_token * stride_qs, grad_out + class_token * stride_gs
    class_lse, class_delta = lse + class_token, delta + class_token
    step_q, step_g = dilation * stride_qs, dilation * stride_gs
    if not IS_GLOBAL:
        acc_k, acc_v = _key_gradient_range(
            key, value, class_q, class_grad, class_lse, class_delta, step_q, step_g, dilation, begin, full, end,
            first, stop, scale, acc_k, acc_v, BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip
        acc_k, acc_v = _key_gradient_range(
            key, value, class_q, class_grad, class_lse, class_delta, step_q, step_g, dilation, full, full_end, end,
            first, stop, scale, acc_k, acc_v, BLOCK, WIDTH, False, PRECISION,
        )  # fmt: skip
        begin = full_end
    acc_k, acc_v = _key_gradient_range(
        key, value, class_q, class_grad, class_lse, class_delta, step_q, step_g, dilation, begin, end, end,
        first, stop, scale, acc_k, acc_v, BLOCK, WIDTH, True, PRECISION,
    )  # fmt: skip

    if HAS_GLOBAL:
        first, stop, begin, end = global_range(ranges, num_slots, slot, exists & (piece == 0))
        acc_k, acc_v = _key_gradient_range(
            key, value, q, grad_out, lse, delta, stride_qs, stride_gs, 1, begin, end, end,
            first, stop, scale, acc_k, acc_v, GLOBAL_BLOCK, WIDTH, True, PRECISION,
        )  # fmt: skip

    offset = batch * stride_db + piece * stride_dp + head * stride_dh + class_slot * stride_ds
    rows_k = rows_of(grad_k + offset, start, dilation * stride_ds, ROWS, WIDTH)
    rows_v = rows_of(grad_v + offset, start, dilation * stride_ds, ROWS, WIDTH)
    tl.store(rows_k, (acc_k * natural_scale).to(grad_k.dtype.element_ty), mask=exists[:, None])
    tl.store(rows_v, acc_v.to(grad_v.dtype.element_ty), mask=exists[:, None])


@triton.jit(do_not_specialize=VARYING_OF_PARTS)
def sum_kernel(
    part_q, part_k, part_v, grad_q, grad_k, grad_v, stride_db, stride_ds, stride_dh, num_global, num_heads, pieces,
    PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one global slot in one head, from those over its pieces, [b, p, g, h, d]."""
    index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    piece = tl.arange(0, PIECES)
    row, exists = batch * pieces + piece, piece < pieces
    to = batch * stride_db + index * stride_ds + head * stride_dh + tl.arange(0, WIDTH)
    share_q = load_part(part_q, row, exists, index, head, num_global, num_heads, WIDTH)
    tl.store(grad_q + to, tl.sum(share_q, 0).to(grad_q.dtype.element_ty))
    share_k = load_part(part_k, row, exists, index, head, num_global, num_heads, WIDTH)
    tl.store(grad_k + to, tl.sum(share_k, 0).to(grad_k.dtype.element_ty))
    share_v = load_part(part_v, row, exists, index, head, num_global, num_heads, WIDTH)
    tl.store(grad_v + to, tl.sum(share_v, 0).to(grad_v.dtype.element_ty))
