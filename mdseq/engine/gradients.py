"""The norm of a step's gradient: which steps DeepSpeed takes, and how it clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def check_gradient_norm(engine: DeepSpeedEngine, allowed: Callable[[float], bool]) -> None:
    """Have every rank skip a step whose gradient norm is not finite, or not `allowed`.

    The norm is that of the whole gradient, the same on every rank, before clipping. DeepSpeed skips a step by itself if
    the norm is infinite; so one that is not allowed is shown to it as such.

    What DeepSpeed would do besides is left out, for each is a pass over all gradients, and some let the GPU wait:
    copying them to fp64 for the norm, looking for values that are not finite, putting them in order before they become
    fp32, dividing and multiplying them by 1.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero import stage3

    optimizer = engine.optimizer
    by_group = engine.zero_optimization_stage() == 3
    name = "_get_norm_groups" if by_group else "scaled_global_norm"
    measure = getattr(optimizer, name)
    norm = math.inf

    def checked() -> Any:
        nonlocal norm
        found = measure()
        norm = float(combine_grad_norm_groups(found) if by_group else found)
        if allowed(norm):
            if not by_group:
                _widen_gradients(optimizer)
            return found
        infinite = torch.tensor(torch.inf, device=engine.device)
        return [infinite] if by_group else infinite

    def norm_of(gradients: Sequence[Tensor], _weights: object) -> Tensor:
        return norm_of_shares(gradients, optimizer.dp_process_group)

    def clip(gradients: Sequence[Tensor], _norm: object) -> None:
        if 0 < optimizer.clip_grad < norm:
            for gradient in gradients:
                gradient.mul_(optimizer.clip_grad / norm)

    setattr(optimizer, name, checked)
    if by_group:
        stage3.get_norm_dtype = lambda: torch.float32
    else:
        optimizer.get_grad_norm_direct = norm_of
        optimizer.unscale_and_clip_grads = clip
        optimizer.check_overflow = lambda **_: None
        optimizer.gradient_average &= dist.get_world_size() > 1


def _widen_gradients(optimizer: Any) -> None:
    """Put what ZeRO-1 or 2 has gathered of the gradient into the fp32 tensors that the optimiser wants."""
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

    for index, gradients in optimizer.averaged_gradients.items():
        if gradients is not None:
            flats = [gradient.flatten() for gradient in gradients]
            wide = torch.empty(sum(map(len, flats)), device=flats[0].device)
            torch._foreach_copy_(wide.split([len(flat) for flat in flats]), flats)
            optimizer.averaged_gradients[index] = GradPartitionBufferGroup([], wide)


def norm_of_shares(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The norm of what all ranks of a group hold of a gradient, in fp32."""
    real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    squared = torch.zeros((), device=gradients[0].device)
    if real:
        squared = torch.stack(torch._foreach_norm(real, dtype=torch.float32)).square().sum()
    dist.all_reduce(squared, group=group)
    return squared.sqrt()


def step_was_skipped(engine: DeepSpeedEngine) -> bool:
    """Whether the step just asked for was not taken; the same on every rank."""
    return bool(engine.optimizer.overflow)
