"""SwiGLU's activation, silu(gate) * up (Shazeer, arXiv 2002.05202), times an optional weight of each row.

On a GPU it is one kernel forward and one backward, which computes the activation again: only `gate_up`, which the
product before has written anyway, and the weights are kept.

Shapes: n rows, f inner dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.kernels.launch import RowTile, has_kernels

# Of a tile. Backward has twice as many numbers of each in registers.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 2048, 1024


def swiglu(gate_up: Tensor, weight_n: Tensor | None = None) -> Tensor:
    """silu(gate) * up, and times weight_n where there is one.

    Args:
        gate_up: [..., 2f], the gate's columns before the others.
        weight_n: fp32 [n], for `gate_up` [n, 2f]; its gradient is fp32 too.

    Returns:
        [..., f] in the type of `gate_up`.
    """
    if not has_kernels(gate_up):
        return plain_swiglu(gate_up, weight_n)
    out_nf: Tensor = FusedSwiglu.apply(gate_up.flatten(0, -2), weight_n)
    return out_nf.view(*gate_up.shape[:-1], out_nf.shape[1])


def plain_swiglu(gate_up: Tensor, weight_n: Tensor | None = None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    return out if weight_n is None else (out * weight_n[:, None]).to(gate_up.dtype)


class FusedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_nF: Tensor, weight_n: Tensor | None) -> Tensor:
        from mdseq.kernels.fused_swiglu import forward_kernel

        gate_up_nF = gate_up_nF.contiguous()
        weight_n = None if weight_n is None else weight_n.contiguous()
        ctx.save_for_backward(gate_up_nF, weight_n)
        n, f = gate_up_nF.shape[0], gate_up_nF.shape[1] // 2
        out_nf = gate_up_nF.new_empty(n, f)
        tile = RowTile.of(f, FORWARD_ELEMENTS)
        if out_nf.numel():
            with torch.cuda.device_of(gate_up_nF):
                grid = (tile.down(n) * tile.across(f),)
                forward_kernel[grid](gate_up_nF, weight_n, out_nf, n, WIDTH=f, **tile.constants)
        return out_nf

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nf: Tensor) -> tuple[Tensor, Tensor | None]:
        from mdseq.kernels.fused_swiglu import backward_kernel

        gate_up_nF, weight_n = ctx.saved_tensors
        grad_nf = grad_nf.contiguous()
        n, f = grad_nf.shape
        grad_gate_up_nF = torch.empty_like(gate_up_nF)
        grad_weight_n = None if weight_n is None else torch.zeros_like(weight_n)
        tile = RowTile.of(f, BACKWARD_ELEMENTS)
        if grad_nf.numel():
            with torch.cuda.device_of(grad_nf):
                backward_kernel[tile.down(n),](
                    gate_up_nF, weight_n, grad_nf, grad_gate_up_nF, grad_weight_n, n, WIDTH=f, **tile.constants
                )
        return grad_gate_up_nF, grad_weight_n
