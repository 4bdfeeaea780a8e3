"""Which steps DeepSpeed takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def check_gradient_norm(engine: DeepSpeedEngine, allowed: Callable[[float], bool]) -> None:
    """Have every rank skip a step whose gradient norm is not finite, or not `allowed`.

    The norm is that of the whole gradient, the same on every rank, before clipping. DeepSpeed skips a step by itself if
    the norm is infinite; so one that is not allowed is shown to it as such. It is computed in fp32: for fp64, DeepSpeed
    would make copies of all gradients, which took 4 % of a step of 1.6 billion weights on an H200.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (stage_1_and_2, stage3):
        module.get_norm_dtype = lambda: torch.float32
    optimizer = engine.optimizer
    by_group = engine.zero_optimization_stage() == 3
    name = "_get_norm_groups" if by_group else "scaled_global_norm"
    measure = getattr(optimizer, name)

    def checked() -> Any:
        found = measure()
        if allowed(float(combine_grad_norm_groups(found) if by_group else found)):
            return found
        infinite = torch.tensor(torch.inf, device=engine.device)
        return [infinite] if by_group else infinite

    setattr(optimizer, name, checked)


def step_was_skipped(engine: DeepSpeedEngine) -> bool:
    """Whether the step just asked for was not taken; the same on every rank."""
    return bool(engine.optimizer.overflow)
