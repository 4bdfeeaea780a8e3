"""How unevenly long the ranks of a run take for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any


@dataclass(frozen=True)
class Pace:
    """One rank in one step.

    Attributes:
        host: Its node's name.
        own_seconds: What it took itself, not counting its waits for other ranks.
        data_seconds: What of that it waited for data.
        step_seconds: What the step took, waits included.
    """

    host: str
    own_seconds: float
    data_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Spread:
    """The slowest rank of a step against the others.

    Attributes:
        own_seconds_median: Of all ranks; of two middle ones the lower, so that of two ranks one is compared with the
            other.
        own_seconds_slowest, data_seconds_slowest: Of the slowest rank; see Pace.
        step_seconds: The longest step.
        slowest_rank, slowest_host: Which it is, and on which node.
    """

    own_seconds_median: float
    own_seconds_slowest: float
    data_seconds_slowest: float
    step_seconds: float
    slowest_rank: int
    slowest_host: str

    @classmethod
    def of(cls, paces: Sequence[Pace]) -> Spread:
        """Of all ranks' paces, in the order of ranks."""
        rank = max(range(len(paces)), key=lambda rank: paces[rank].own_seconds)
        return cls(
            own_seconds_median=median_low(pace.own_seconds for pace in paces),
            own_seconds_slowest=paces[rank].own_seconds,
            data_seconds_slowest=paces[rank].data_seconds,
            step_seconds=max(pace.step_seconds for pace in paces),
            slowest_rank=rank,
            slowest_host=paces[rank].host,
        )

    @property
    def factor(self) -> float:
        """How many times as long as the median the slowest rank takes."""
        return self.own_seconds_slowest / max(self.own_seconds_median, 1e-9)

    def metrics(self) -> dict[str, Any]:
        """The numbers of it."""
        return {name: value for name, value in asdict(self).items() if name != "slowest_host"}

    def __str__(self) -> str:
        return (
            f"rank {self.slowest_rank} on {self.slowest_host} takes {self.factor:.1f} times as long as the median "
            f"(own time {self.own_seconds_slowest:.3g} s a step, median {self.own_seconds_median:.3g} s; "
            f"{round(self.data_seconds_slowest, 3):.3g} s waiting for data)"
        )
