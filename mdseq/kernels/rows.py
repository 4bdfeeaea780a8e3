"""Rows sent to experts and brought together again: two sums over rows, each the other's gradient.

Both are out_i = sum over k of x[index_ik]. Whoever sorts assignments by expert knows both directions, where each row
goes and where each comes from, so neither way needs atomic additions, and results are deterministic. On a GPU one
kernel does both, adding up in fp32.

Shapes: n tokens, k assignments a token, a = n * k assignments in another order, d width; m, i any number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdseq.kernels.launch import RowTile, has_kernels

ELEMENTS = 2048  # of a tile


def dispatch(x_nd: Tensor, source_a: Tensor, position_nk: Tensor) -> Tensor:
    """Copies of rows in a new order, out_a = x[source_a]; those of x_n stand at position_nk: [a, d]."""
    out_ad: Tensor = _SumRows.apply(x_nd, source_a[:, None], position_nk)
    return out_ad


def combine(y_ad: Tensor, source_a: Tensor, position_nk: Tensor) -> Tensor:
    """The sum of what became of each row's copies, out_n = sum over k of y[position_nk]: [n, d]."""
    out_nd: Tensor = _SumRows.apply(y_ad, position_nk, source_a[:, None])
    return out_nd


class _SumRows(torch.autograd.Function):
    """`sum_rows` by one index, whose gradient is that by the other: j is in there[i] where i is in back[j]."""

    @staticmethod
    def forward(ctx: Any, x_md: Tensor, there_ik: Tensor, back_mk: Tensor) -> Tensor:
        ctx.save_for_backward(there_ik, back_mk)
        return sum_rows(x_md, there_ik)

    @staticmethod
    def backward(ctx: Any, grad_id: Tensor) -> tuple[Tensor, None, None]:
        there_ik, back_mk = ctx.saved_tensors
        return _SumRows.apply(grad_id, back_mk, there_ik), None, None


def sum_rows(x_md: Tensor, index_ik: Tensor) -> Tensor:
    """out_i = sum over k of x[index_ik]."""
    return fused_sum_rows(x_md, index_ik) if has_kernels(x_md) else plain_sum_rows(x_md, index_ik)


def plain_sum_rows(x_md: Tensor, index_ik: Tensor) -> Tensor:
    picked = x_md.index_select(0, index_ik.flatten())
    return picked if index_ik.shape[1] == 1 else picked.view(*index_ik.shape, x_md.shape[1]).sum(dim=1)


def fused_sum_rows(x_md: Tensor, index_ik: Tensor) -> Tensor:
    from mdseq.kernels.fused_rows import sum_rows_kernel

    (i, k), d = index_ik.shape, x_md.shape[1]
    out_id = x_md.new_empty(i, d)
    tile = RowTile.of(d, ELEMENTS)
    if out_id.numel():
        with torch.cuda.device_of(x_md):
            sum_rows_kernel[tile.down(i) * tile.across(d),](
                x_md.contiguous(), index_ik.contiguous(), out_id, i, WIDTH=d, COUNT=k, **tile.constants
            )
    return out_id
