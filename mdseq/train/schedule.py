"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mdseq.spec import OptimiserSpec, ScheduleSpec


def learning_rate(step: int, optimiser: OptimiserSpec, schedule: ScheduleSpec) -> float:
    """Linear warm-up, then the schedule's decay to `final_fraction` of the peak; `step` counts from 0."""
    if step < schedule.warmup_steps:
        return optimiser.learning_rate * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    left = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[schedule.decay]
    return optimiser.learning_rate * (schedule.final_fraction + (1.0 - schedule.final_fraction) * left)
