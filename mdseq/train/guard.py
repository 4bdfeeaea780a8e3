"""Steps that are better not taken: losses or gradients that are not finite, or many times as large as before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from mdseq.spec import GuardSpec

HISTORY, MIN_HISTORY = 100, 20


class TrainingDiverged(Exception):
    """Too many steps in a row could not be taken."""


class Guard:
    """Decides over steps by what is the same on every rank, so that all ranks skip together.

    A value is a spike if it exceeds `spike_factor` times the median of the last HISTORY values of steps taken.

    Attributes:
        skipped: Steps not taken so far.
        in_a_row: Of those, the last ones without one taken in between.
        reason: Why the newest of them was not.
    """

    def __init__(self, spec: GuardSpec) -> None:
        self.spec = spec
        self.skipped = 0
        self.in_a_row = 0
        self.reason = ""
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=HISTORY) for name in ("loss", "gradient norm")}
        self._newest: dict[str, float] = {}

    def allows(self, name: str, value: float) -> bool:
        """Whether a step with this value may be taken, as far as it goes."""
        seen = self._seen[name]
        self._newest[name] = value
        if not math.isfinite(value):
            self.reason = f"its {name} is {value}"
            return False
        if self.spec.spike_factor and len(seen) >= MIN_HISTORY and value > self.spec.spike_factor * median(seen):
            self.reason = f"its {name} is {value:.4g}, {value / median(seen):.0f} times the median of the last steps"
            return False
        return True

    @property
    def gradient_norm(self) -> float:
        """Of the last step taken, before clipping."""
        seen = self._seen["gradient norm"]
        return seen[-1] if seen else 0.0

    def end_step(self, taken: bool) -> None:
        """Count a step.

        Raises:
            TrainingDiverged: Too many have been skipped.
        """
        if taken:
            self.in_a_row = 0
            for name, value in self._newest.items():
                self._seen[name].append(value)
        else:
            self.skipped += 1
            self.in_a_row += 1
        self._newest.clear()
        if self.in_a_row > self.spec.max_skipped:
            raise TrainingDiverged(f"{self.in_a_row} steps in a row could not be taken: of the last, {self.reason}")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "seen": {name: list(values) for name, values in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        for name, values in state["seen"].items():
            self._seen[name] = deque(values, maxlen=HISTORY)
