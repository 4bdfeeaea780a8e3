"""Rotary positions applied to queries or keys (RoFormer, arXiv 2104.09864).

On a GPU it is one kernel that reads and writes x once; the gradient is the rotation by the negative angle.

Shapes: b batch, s slots, h heads, e head dimension, p = e / 2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.kernels.launch import RowTile, has_kernels

PAIRS = 2048  # of a tile


def rotate(x_bshe: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + e/2}) by its position's angle.

    Args:
        angles: Its cosine and sine, each fp32 [b, s, 1, p]; constants, which get no gradient on a GPU.

    Returns:
        [b, s, h, e] in the type of x, rounded to it once.
    """
    if not has_kernels(x_bshe):
        return plain_rotate(x_bshe, angles)
    out_bshe: Tensor = FusedRotate.apply(x_bshe, *angles)
    return out_bshe


def plain_rotate(x_bshe: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    first, second = x_bshe.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_bshe.dtype)


class FusedRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bshe: Tensor, cos_bs1p: Tensor, sin_bs1p: Tensor) -> Tensor:
        angles = cos_bs1p.contiguous(), sin_bs1p.contiguous()
        ctx.save_for_backward(*angles)
        return _rotated(x_bshe, angles, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bshe: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad_bshe, ctx.saved_tensors, inverse=True), None, None


def _rotated(x_bshe: Tensor, angles: tuple[Tensor, Tensor], inverse: bool) -> Tensor:
    from mdseq.kernels.fused_rotate import rotate_kernel

    b, s, h, e = x_bshe.shape
    cos_bs1p, sin_bs1p = angles
    assert cos_bs1p.shape == sin_bs1p.shape == (b, s, 1, e // 2)
    x_bshe = x_bshe.contiguous()
    out_bshe = torch.empty_like(x_bshe)
    tile = RowTile.of(e // 2, PAIRS)
    if out_bshe.numel():
        with torch.cuda.device_of(x_bshe):
            rotate_kernel[tile.down(b * s * h),](
                x_bshe, cos_bs1p, sin_bs1p, out_bshe, b * s * h,
                HEADS=h, PAIRS=e // 2, INVERSE=inverse, **tile.constants,
            )  # fmt: skip
    return out_bshe
