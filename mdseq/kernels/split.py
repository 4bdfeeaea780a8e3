"""Several products of one input, as if they were one: a single weight, and a gradient of the input that no pass over
memory adds up.

Shapes: n rows, k inner dimension, o outer dimension of all products together, m of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_linear(x: Tensor, weight_ok: Tensor, parts: int) -> tuple[Tensor, ...]:
    """x W^T for each of as many equal parts of the weight's rows, each contiguous: [..., m].

    `F.linear(x, weight).chunk(parts)` has the same values, in one tensor; then every gradient would have to be copied
    into one too.
    """
    outs: tuple[Tensor, ...] = _SplitLinear.apply(x.flatten(0, -2), weight_ok, parts)
    return tuple(out_nm.unflatten(0, x.shape[:-1]) for out_nm in outs)


class _SplitLinear(torch.autograd.Function):
    """Keeps the weight itself, not views of it: under ZeRO-3 they would be of memory that is given back."""

    @staticmethod
    def forward(ctx: Any, x_nk: Tensor, weight_ok: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_nk, weight_ok)
        return tuple(F.linear(x_nk, weight_mk) for weight_mk in weight_ok.chunk(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_nm: Tensor) -> tuple[Tensor, Tensor, None]:
        x_nk, weight_ok = ctx.saved_tensors
        first, *others = zip(grads_nm, weight_ok.chunk(len(grads_nm)), strict=True)
        grad_x_nk = torch.mm(*first)
        for grad_nm, weight_mk in others:
            grad_x_nk.addmm_(grad_nm, weight_mk)
        grad_weight_ok = torch.empty_like(weight_ok)
        for grad_nm, of_part_mk in zip(grads_nm, grad_weight_ok.chunk(len(grads_nm)), strict=True):
            torch.mm(grad_nm.t(), x_nk, out=of_part_mk)
        return grad_x_nk, grad_weight_ok, None
