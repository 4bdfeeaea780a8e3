"""Each group of rows times its own matrix, in one kernel launch that need not know the groups' sizes beforehand.

Shapes: a rows, e groups, k inner and n outer dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch.nn.functional.grouped_mm takes (ATen/native/GroupedMMUtils.h, cuda/GroupMM.cu). On a GPU it would take
# float32 and float16 too, but copies the groups' sizes to the host for them, and is no faster than the loop here.
CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_TYPES = (torch.bfloat16,)
MOST_GROUPS = 1023
ALIGNMENT_BYTES = 16


def grouped_linear(x_ak: Tensor, weight_enk: Tensor, end_e: Tensor) -> Tensor:
    """x W_e^T for the rows of each group.

    Args:
        x_ak: Rows in the order of their groups.
        weight_enk: As many matrices as groups, each like that of `torch.nn.Linear`.
        end_e: int32, the row behind the last of each group; that of the last group is a.

    Returns:
        [a, n]; a group without rows has a gradient of zeros.
    """
    if not _fits(x_ak, weight_enk):
        return loop_linear(x_ak, weight_enk, end_e)
    out_an: Tensor = _GroupedLinear.apply(x_ak.contiguous(), weight_enk.contiguous(), end_e)
    return out_an


def loop_linear(x_ak: Tensor, weight_enk: Tensor, end_e: Tensor) -> Tensor:
    """A product for each group; the host waits for the groups' sizes."""
    count_e = end_e.diff(prepend=end_e.new_zeros(1)).tolist()
    groups = zip(x_ak.split(count_e), weight_enk, strict=True)
    return torch.cat([F.linear(x, weight) for x, weight in groups])


class _GroupedLinear(torch.autograd.Function):
    """torch's own derivative refuses gradients that are expanded, and keeps a view of the weight: under ZeRO-3 that
    would be a view of memory that is given back between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_ak: Tensor, weight_enk: Tensor, end_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_ak, weight_enk, end_e)
        return F.grouped_mm(x_ak, weight_enk.transpose(1, 2), offs=end_e)

    @staticmethod
    def backward(ctx: Any, grad_an: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ak, weight_enk, end_e = ctx.saved_tensors
        grad_an = grad_an.contiguous()
        x_needed, weight_needed, _ = ctx.needs_input_grad
        return (
            F.grouped_mm(grad_an, weight_enk, offs=end_e) if x_needed else None,
            F.grouped_mm(grad_an.t(), x_ak, offs=end_e) if weight_needed else None,
            None,
        )


def _fits(x_ak: Tensor, weight_enk: Tensor) -> bool:
    types = GPU_TYPES if x_ak.is_cuda else CPU_TYPES
    extents_bytes = [size * x_ak.element_size() for size in weight_enk.shape[1:]]
    # A weight that lies in a shared buffer, as under ZeRO, may start anywhere.
    starts = [x.data_ptr() for x in (x_ak, weight_enk)] if x_ak.is_cuda else []
    return (
        x_ak.dtype == weight_enk.dtype
        and x_ak.dtype in types
        and len(x_ak) > 0
        and len(weight_enk) <= MOST_GROUPS
        and all(number % ALIGNMENT_BYTES == 0 for number in (*extents_bytes, *starts))
    )
