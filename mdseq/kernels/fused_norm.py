# mypy: ignore-errors
"""Triton kernels of a sum and its RMSNorm; all rows are contiguous, [n, WIDTH], and COLUMNS holds a whole one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x, added, weight, total, normed, num_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of total = x + added, rounded, and of their norm; without `added`, of that of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offset = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + offset, mask=real, other=0.0).to(tl.float32)
    if added is not None:
        value += tl.load(added + offset, mask=real, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=real)
        value = rounded.to(tl.float32)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None] * scale[None, :]
    tl.store(normed + offset, value.to(normed.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    total, weight, grad_total, grad_normed, grad_x, grad_weight, num_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of x, for every so many rows, and what these rows add to that of the weight.

    With u = total / rms(total) and g = grad_normed * weight, that of x is (g - u mean(g u)) / rms(total) + grad_total.
    """
    column = tl.arange(0, COLUMNS)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        real = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offset = row[:, None] * WIDTH + column[None, :]
        value = tl.load(total + offset, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + offset, mask=real, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
        value *= inverse
        of_weight += grad * value
        grad *= scale
        grad = (grad - value * (tl.sum(grad * value, 1) / WIDTH)[:, None]) * inverse
        if grad_total is not None:
            grad += tl.load(grad_total + offset, mask=real, other=0.0).to(tl.float32)
        tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=real)
    place = tl.program_id(0) * WIDTH + column
    tl.store(grad_weight + place, tl.sum(of_weight, 0), mask=column < WIDTH)
