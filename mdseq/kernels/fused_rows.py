# mypy: ignore-errors
"""Triton kernel that picks rows and adds them up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def sum_rows_kernel(
    x, index, out, num_rows, WIDTH: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One tile of `out` [num_rows, WIDTH]: of each row, the sum of the COUNT rows of `x` that `index` names."""
    across = tl.cdiv(WIDTH, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < num_rows
    real = exists[:, None] & (column < WIDTH)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(COUNT):
        picked = tl.load(index + row * COUNT + j, mask=exists, other=0).to(tl.int64)
        total += tl.load(x + picked[:, None] * WIDTH + column[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + column[None, :], total.to(out.dtype.element_ty), mask=real)
