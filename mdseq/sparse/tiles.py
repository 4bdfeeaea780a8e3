"""Attention of one tile, and its gradients: some blocks of queries, each against a few sets of keys under one softmax.

The scores of a tile are computed, used and dropped while they are in the processor's cache; the backward pass computes
them again. Everything is a matrix product but the softmax itself.

Shapes: h heads, x blocks of a tile, c queries of a block, k keys that a block meets in one set, s rows of keys,
e head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that a tile should hold at most: few enough for a processor's cache, enough to make a call worth its while.
TILE_SCORES = 2**20


@dataclass(frozen=True)
class KeyValue:
    """Rows of keys and of values, [h, s, e] each; or sums of their gradients, which are added to in place."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of the same slots and heads, [..., s, h, e]; or their gradients, written in place."""

    q: Tensor
    k: Tensor
    v: Tensor

    def at(self, row: int, heads: slice) -> Heads:
        """[s, h, e] of [b, s, h, e]: a view."""
        return Heads(*(x_bshe[row, :, heads] for x_bshe in (self.q, self.k, self.v)))

    def keys(self, heads: slice) -> KeyValue:
        """[h, s, e] of [s, h, e]: a view."""
        return KeyValue(self.k[:, heads].transpose(0, 1), self.v[:, heads].transpose(0, 1))


class KeySet(Protocol):
    """Which rows of keys each block of a tile meets."""

    @property
    def length(self) -> int:
        """Rows that a block meets (k)."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """Added to the scores, broadcast to [h, x, c, k]: 0 where a query sees a key, -inf where not; None for 0."""
        ...

    def scores(self, left_hxce: Tensor, rows_hse: Tensor, scale: float, plus: Tensor | None, spare: int = 0) -> Tensor:
        """scale * left rows^T + plus, of every block with the rows that it meets: [h, x, c, k + spare].

        The last `spare` columns may hold anything.
        """
        ...

    def mix(self, weight_hxck: Tensor, rows_hse: Tensor) -> Tensor:
        """weight rows, of every block: [h, x, c, e]."""
        ...

    def add_rows(self, total_hse: Tensor, weight_hxck: Tensor, right_hxce: Tensor) -> None:
        """Add weight^T right, of every block, to the rows that it meets."""
        ...


@dataclass(frozen=True)
class Sliding:
    """Each block meets a stretch of rows, `step` rows after that of the block before.

    Attributes:
        first: First row that the first block meets.
        step: Rows from block to block.
    """

    first: int
    step: int
    length: int
    bias: Tensor | None

    def scores(self, left_hxce: Tensor, rows_hse: Tensor, scale: float, plus: Tensor | None, spare: int = 0) -> Tensor:
        # A product with a few rows more costs less than to copy it into something wider.
        rows_hxke = self._stretches(rows_hse, 0, 1, left_hxce.shape[1], self.length + spare)
        scores_hxck = _start(left_hxce, self.length, plus, spare)
        left, right = left_hxce.flatten(0, 1), rows_hxke.flatten(0, 1).transpose(1, 2)
        scores_hxck.flatten(0, 1).baddbmm_(left, right, beta=0.0 if plus is None else 1.0, alpha=scale)
        return scores_hxck

    def mix(self, weight_hxck: Tensor, rows_hse: Tensor) -> Tensor:
        rows_hxke = self._stretches(rows_hse, 0, 1, weight_hxck.shape[1], self.length)
        out = torch.bmm(weight_hxck.flatten(0, 1), rows_hxke.flatten(0, 1))
        return out.unflatten(0, rows_hxke.shape[:2])

    def add_rows(self, total_hse: Tensor, weight_hxck: Tensor, right_hxce: Tensor) -> None:
        # Neighbours overlap, every n-th block does not: n sums, each in place, in a fixed order.
        every = -(-self.length // self.step)
        for first in range(min(every, weight_hxck.shape[1])):
            weight, right = weight_hxck[:, first::every].transpose(2, 3), right_hxce[:, first::every]
            total_hxke = self._stretches(total_hse, first, every, weight.shape[1], self.length)
            if len(weight) == 1:
                total_hxke[0].baddbmm_(weight[0], right[0])
            else:
                total_hxke.add_(torch.matmul(weight, right))

    def _stretches(self, rows_hse: Tensor, first: int, every: int, count: int, length: int) -> Tensor:
        """What the blocks `first`, `first + every`, ... meet: [h, x, k, e], overlapping views of the rows."""
        head, row, column = rows_hse.stride()
        offset = rows_hse.storage_offset() + (self.first + first * self.step) * row
        shape = (len(rows_hse), count, length, rows_hse.shape[2])
        return rows_hse.as_strided(shape, (head, every * self.step * row, row, column), offset)


@dataclass(frozen=True)
class Shared:
    """All blocks meet the same rows."""

    rows: slice
    bias: Tensor | None = None

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start

    def scores(self, left_hxce: Tensor, rows_hse: Tensor, scale: float, plus: Tensor | None, spare: int = 0) -> Tensor:
        scores_hxck = _start(left_hxce, self.length, plus)
        left, right = left_hxce.flatten(1, 2), rows_hse[:, self.rows].transpose(1, 2)
        scores_hxck.flatten(1, 2).baddbmm_(left, right, beta=0.0 if plus is None else 1.0, alpha=scale)
        return F.pad(scores_hxck, (0, spare)) if spare else scores_hxck

    def mix(self, weight_hxck: Tensor, rows_hse: Tensor) -> Tensor:
        out = torch.bmm(weight_hxck.flatten(1, 2), rows_hse[:, self.rows])
        return out.unflatten(1, weight_hxck.shape[1:3])

    def add_rows(self, total_hse: Tensor, weight_hxck: Tensor, right_hxce: Tensor) -> None:
        weight, right = weight_hxck.flatten(1, 2).transpose(1, 2), right_hxce.flatten(1, 2)
        total_hse[:, self.rows].baddbmm_(weight, right)


Source = tuple[KeySet, KeyValue]


def attend_tile(q_hxce: Tensor, sources: Sequence[Source]) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v over all key sets together: [h, x, c, e].

    Args:
        sources: Key sets, and the rows that they point into. Every query must see a key.
    """
    parts = zip(_probabilities(q_hxce, sources), sources, strict=True)
    first, *others = (keys.mix(p_hxck, rows.v) for p_hxck, (keys, rows) in parts)
    for other in others:
        first += other
    return first


def add_gradients(
    q_hxce: Tensor, grad_hxce: Tensor, delta_hxc1: Tensor, sources: Sequence[Source], totals: Sequence[KeyValue]
) -> Tensor:
    """The gradient of the queries, [h, x, c, e]; those of keys and values are added to `totals`, one a source.

    With P the probabilities and dO the gradient of the output O (FlashAttention-2, arXiv 2307.08691, section 2.3.2):
    dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q.

    Args:
        delta_hxc1: Sum of dO * O over the head dimension.
    """
    scale = q_hxce.shape[-1] ** -0.5
    grad_q_hxce, scaled_q_hxce = torch.zeros_like(q_hxce), q_hxce * scale
    for p_hxck, (keys, rows), total in zip(_probabilities(q_hxce, sources), sources, totals, strict=True):
        ds_hxck = keys.scores(grad_hxce, rows.v, 1.0, -delta_hxc1).mul_(p_hxck)
        keys.add_rows(total.v, p_hxck, grad_hxce)
        keys.add_rows(total.k, ds_hxck, scaled_q_hxce)
        grad_q_hxce.add_(keys.mix(ds_hxck, rows.k), alpha=scale)
    return grad_q_hxce


def _probabilities(q_hxce: Tensor, sources: Sequence[Source]) -> Sequence[Tensor]:
    """[h, x, c, k] of each source; together they sum to 1."""
    scale = q_hxce.shape[-1] ** -0.5
    lengths = [keys.length for keys, _ in sources]
    (first, rows), *others = sources
    scores_hxck = first.scores(q_hxce, rows.k, scale, first.bias, spare=sum(lengths[1:]))
    for part, (keys, rows) in zip(scores_hxck.split(lengths, dim=-1)[1:], others, strict=True):
        part.copy_(keys.scores(q_hxce, rows.k, scale, keys.bias))
    return scores_hxck.softmax(dim=-1).split(lengths, dim=-1)


def _start(left_hxce: Tensor, num_keys: int, plus: Tensor | None, spare: int = 0) -> Tensor:
    """What a product is added to, [h, x, c, k + spare]: `plus`, if that is given, in the first k columns."""
    memory_hxck = left_hxce.new_empty(*left_hxce.shape[:3], num_keys + spare)
    if plus is not None:
        memory_hxck[..., :num_keys].copy_(plus)
    return memory_hxck


def head_groups(num_heads: int, size_of_one: int, limit: int) -> Iterator[slice]:
    """As many heads at a time as stay within a limit, at least one; groups as equal as can be."""
    num_groups = -(-num_heads // max(1, limit // size_of_one))
    for group in range(num_groups):
        yield slice(group * num_heads // num_groups, (group + 1) * num_heads // num_groups)
