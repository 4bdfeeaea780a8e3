# mypy: ignore-errors
"""Triton kernels of SwiGLU; all rows are contiguous, those of `gate_up` [n, 2 WIDTH], all others [n, WIDTH]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    gate_up, weight, out, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """silu(gate) * up * weight of one tile."""
    across = tl.cdiv(WIDTH, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    real = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    gates = gate_up + row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(gates, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gates + WIDTH, mask=real, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if weight is not None:
        result *= tl.load(weight + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[:, None] * WIDTH + column[None, :], result.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    gate_up, weight, grad, grad_gate_up, grad_weight, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of a few whole rows: one program sums up what is a weight's, always in the same order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    if weight is not None:
        scale = tl.load(weight + row, mask=exists, other=0.0).to(tl.float32)[:, None]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = exists[:, None] & (column < WIDTH)[None, :]
        offset = row[:, None] * (2 * WIDTH) + column[None, :]
        gate = tl.load(gate_up + offset, mask=real, other=0.0).to(tl.float32)
        up = tl.load(gate_up + offset + WIDTH, mask=real, other=0.0).to(tl.float32)
        of_out = tl.load(grad + row[:, None] * WIDTH + column[None, :], mask=real, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if weight is not None:
            of_weight += of_out * silu * up
            of_out *= scale
        of_gate = of_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        of_up = of_out * silu
        tl.store(grad_gate_up + offset, of_gate.to(grad_gate_up.dtype.element_ty), mask=real)
        tl.store(grad_gate_up + offset + WIDTH, of_up.to(grad_gate_up.dtype.element_ty), mask=real)
    if weight is not None:
        tl.store(grad_weight + row, tl.sum(of_weight, 1).to(grad_weight.dtype.element_ty), mask=exists)
