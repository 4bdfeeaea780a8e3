"""A sum and its RMSNorm (Zhang and Sennrich, arXiv 1910.07467).

On a GPU it is one kernel forward, and one backward that adds up what comes through the sum and through the norm.

Shapes: n rows, d width, p programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.kernels.launch import RowTile, has_kernels

FORWARD_ELEMENTS = 2048  # of a tile, but no less than a row
# Of the backward pass. Few programs, each with a partial gradient of the weight, load far ahead: two for each of an
# H200's multiprocessors. A tile that is larger leaves no room for that.
BACKWARD_BYTES, MOST_BYTES = 2**13, 2**14
MOST_PROGRAMS, WARPS, STAGES = 264, 8, 3


def add_norm(x: Tensor, added: Tensor | None, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, or x for None, and weight * that / sqrt(mean(that^2) + eps).

    Args:
        x: [..., d].
        added: Of the same shape.

    Returns:
        Both [..., d].
    """
    if not has_kernels(x) or any(y.dtype != x.dtype for y in (added, weight_d) if y is not None):
        return plain_add_norm(x, added, weight_d, eps)
    added_nd = None if added is None else added.flatten(0, -2)
    total_nd, normed_nd = FusedAddNorm.apply(x.flatten(0, -2), added_nd, weight_d, eps)
    return total_nd.view(x.shape), normed_nd.view(x.shape)


def plain_add_norm(x: Tensor, added: Tensor | None, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if added is None else x + added
    return total, torch.nn.functional.rms_norm(total, weight_d.shape, weight_d, eps)


class FusedAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, added_nd: Tensor | None, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from mdseq.kernels.fused_norm import forward_kernel

        x_nd = x_nd.contiguous()
        total_nd = x_nd if added_nd is None else torch.empty_like(x_nd)
        normed_nd = torch.empty_like(x_nd)
        n, d = x_nd.shape
        tile = RowTile.whole(d, FORWARD_ELEMENTS)
        if x_nd.numel():
            with torch.cuda.device_of(x_nd):
                forward_kernel[tile.down(n),](
                    x_nd, None if added_nd is None else added_nd.contiguous(), weight_d, total_nd, normed_nd, n, eps,
                    WIDTH=d, **tile.constants,
                )  # fmt: skip
        ctx.save_for_backward(total_nd, weight_d)
        ctx.eps, ctx.adds = eps, added_nd is not None
        ctx.set_materialize_grads(False)
        return total_nd, normed_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total_nd: Tensor | None, grad_normed_nd: Tensor | None) -> tuple[Tensor | None, ...]:
        from mdseq.kernels.fused_norm import backward_kernel

        total_nd, weight_d = ctx.saved_tensors
        if grad_normed_nd is None:
            return grad_total_nd, grad_total_nd if ctx.adds else None, None, None
        grad_x_nd = torch.empty_like(total_nd)
        n, d = total_nd.shape
        tile = RowTile.whole(d, BACKWARD_BYTES // total_nd.element_size())
        stages = STAGES if tile.columns * total_nd.element_size() <= MOST_BYTES else 1
        programs = min(tile.down(n), MOST_PROGRAMS)
        grad_weight_pd = torch.empty(programs, d, dtype=torch.float32, device=total_nd.device)
        if total_nd.numel():
            with torch.cuda.device_of(total_nd):
                backward_kernel[programs,](
                    total_nd, weight_d, None if grad_total_nd is None else grad_total_nd.contiguous(),
                    grad_normed_nd.contiguous(), grad_x_nd, grad_weight_pd, n, ctx.eps,
                    WIDTH=d, STAGES=stages, num_warps=WARPS, **tile.constants,
                )  # fmt: skip
        return grad_x_nd, grad_x_nd if ctx.adds else None, grad_weight_pd.sum(0).to(weight_d.dtype), None
