# mypy: ignore-errors
"""Triton kernel of the rotary positions; a row is one head of one position, its pairs are (x_i, x_{i + PAIRS})."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rotate_kernel(
    x, cos, sin, out, num_rows,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of contiguous `x` [positions, HEADS, 2 PAIRS], by angles [positions, PAIRS]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for start in range(0, PAIRS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = (row < num_rows)[:, None] & (column < PAIRS)[None, :]
        angle = (row // HEADS)[:, None] * PAIRS + column[None, :]
        cosine = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
        if INVERSE:
            sine = -sine
        offset = row[:, None] * (2 * PAIRS) + column[None, :]
        first = tl.load(x + offset, mask=real, other=0.0).to(tl.float32)
        second = tl.load(x + offset + PAIRS, mask=real, other=0.0).to(tl.float32)
        tl.store(out + offset, (first * cosine - second * sine).to(out.dtype.element_ty), mask=real)
        tl.store(out + offset + PAIRS, (second * cosine + first * sine).to(out.dtype.element_ty), mask=real)
