# mypy: ignore-errors
"""Triton kernel of keyed dropout: residual + dropped x in one pass, with the mask made on the way, never stored.

Shapes: b rows, s slots of a row, n = b * s slots, d features, c = d / 8 counters of a slot, rounded up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.kernels.random import philox

# Integers that vary from call to call: Triton shall not compile a kernel anew for each that is 1 or a multiple of 16.
VARYING = ("num_slots", "row_slots", "place", "seed", "purpose", "step", "threshold")


def add_dropped(
    x_bsd: Tensor,
    residual_bsd: Tensor | None,
    threshold: int,
    key: tuple[int, int, int],
    row_b: Tensor,
    identity_bs: Tensor,
    place: int,
) -> Tensor:
    """`Dropout.add` of mdseq/model/dropout.py.

    Args:
        x_bsd: What is dropped.
        residual_bsd: What it is added to, or None.
        threshold: Of 16 random bits, below which a value is dropped.
        key: Seed, purpose and step.
        row_b: Id of each row.
        identity_bs: Of each slot in its row.
        place: Where in the model.
    """
    return _AddDropped.apply(
        x_bsd, residual_bsd, row_b.contiguous(), identity_bs.contiguous(), (place, *key, threshold)
    )


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_bsd, residual_bsd, row_b, identity_bs, numbers):
        ctx.save_for_backward(row_b, identity_bs)
        ctx.numbers = numbers
        ctx.dtypes = x_bsd.dtype, None if residual_bsd is None else residual_bsd.dtype
        dtype = x_bsd.dtype if residual_bsd is None else torch.promote_types(x_bsd.dtype, residual_bsd.dtype)
        return _drop(x_bsd, residual_bsd, dtype, row_b, identity_bs, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bsd):
        x_dtype, residual_dtype = ctx.dtypes
        grad_x_bsd = grad_residual_bsd = None
        if ctx.needs_input_grad[0]:
            grad_x_bsd = _drop(grad_bsd, None, x_dtype, *ctx.saved_tensors, ctx.numbers)
        if ctx.needs_input_grad[1]:
            grad_residual_bsd = grad_bsd.to(residual_dtype)
        return grad_x_bsd, grad_residual_bsd, None, None, None


def _drop(x_bsd, residual_bsd, dtype, row_b, identity_bs, numbers):
    b, s, d = x_bsd.shape
    out_bsd = torch.empty(b, s, d, dtype=dtype, device=x_bsd.device)
    if not out_bsd.numel():
        return out_bsd
    x_bsd = x_bsd.contiguous()
    counters, threshold = -(-d // 8), numbers[-1]
    with torch.cuda.device_of(x_bsd):
        _drop_kernel[(triton.cdiv(b * s, 32), triton.cdiv(counters, 32))](
            x_bsd, x_bsd if residual_bsd is None else residual_bsd.contiguous(), out_bsd, row_b, identity_bs,
            b * s, s, *numbers, 2**16 / (2**16 - threshold), d, counters,
            HAS_RESIDUAL=residual_bsd is not None, SLOTS=32, COUNTERS=32,
        )  # fmt: skip
    return out_bsd


@triton.jit(do_not_specialize=VARYING)
def _drop_kernel(
    x, residual, out, row_b, identity_bs,
    num_slots, row_slots, place, seed, purpose, step, threshold, scale, dim, counters,
    HAS_RESIDUAL: tl.constexpr, SLOTS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """A counter decides on eight features; they lie `counters` apart, so that neighbours are read together."""
    n = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    exists_n = n < num_slots
    row_n1 = tl.load(row_b + n // row_slots, mask=exists_n, other=0)[:, None]
    identity_n1 = tl.load(identity_bs + n, mask=exists_n, other=0)[:, None]
    c = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    index_1c = (place * counters + c)[None, :]
    words = philox(index_1c, identity_n1, row_n1, step, seed, purpose)
    for decision in tl.static_range(8):
        kept_nc = ((words[decision // 2] >> (16 * (decision % 2))) & 0xFFFF) >= threshold.to(tl.uint32)
        feature = c + decision * counters
        exists_nc = exists_n[:, None] & ((c < counters) & (feature < dim))[None, :]
        at_nc = n[:, None] * dim + feature[None, :]
        value_nc = tl.load(x + at_nc, mask=exists_nc, other=0.0).to(tl.float32)
        value_nc = tl.where(kept_nc, value_nc * scale, 0.0)
        if HAS_RESIDUAL:
            value_nc += tl.load(residual + at_nc, mask=exists_nc, other=0.0).to(tl.float32)
        tl.store(out + at_nc, value_nc.to(out.dtype.element_ty), mask=exists_nc)
