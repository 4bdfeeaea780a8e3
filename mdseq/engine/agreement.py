"""What ranks decide together, without waiting for their GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from mdseq.errors import UserError

T = TypeVar("T")


class Agreement:
    """Small collectives between the processes themselves (gloo), so that no GPU is synchronised for them.

    All ranks must call the same methods in the same order, from their main threads.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def highest(self, values: Sequence[int]) -> list[int]:
        """The highest over all ranks, value by value."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[int]) -> list[int]:
        """The sum over all ranks, value by value."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean(self, value: float) -> float:
        """Over all ranks."""
        reduced = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(reduced, group=self._group)
        return reduced.item() / self.num_ranks

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.highest([int(flag)])[0])

    def all(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        return not self.any(not flag)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[T | None] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def fail_together(self, error: str | None) -> None:
        """Raise UserError on every rank if there is an error on any; the lowest rank's is told."""
        found = [error for error in self.gather(error) if error]
        if found:
            raise UserError(found[0])

    @contextmanager
    def on_rank_0(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Rank 0 enters the context, and every rank fails if it cannot."""
        with ExitStack() as stack:
            error = None
            if self.rank == 0:
                try:
                    stack.enter_context(context)
                except UserError as caught:
                    error = str(caught)
            self.fail_together(error)
            yield

    def wait(self) -> None:
        """For all ranks."""
        dist.barrier(group=self._group)

    def _reduced(self, values: Sequence[int], how: dist.ReduceOp.RedOpType) -> list[int]:
        reduced = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(reduced, how, group=self._group)
        return reduced.tolist()
