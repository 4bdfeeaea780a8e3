"""Attention by Triton kernels of our own, on a GPU: window, dilation, documents and global slots in one pass.

Every row of queries, keys and values stays where it is: a dilated window is a stride, a document's end is the end of a
loop. A token meets the tokens of its window within its document, then the global slots of its document, all under one
softmax; global slots do the same without a window, and so that a long document keeps the whole GPU busy, they meet its
tokens in pieces, which are merged. Backward: one kernel for the gradients of queries, one for those of keys and values;
both compute the weights again, from the lse (FlashAttention-2, arXiv 2307.08691). Every number is written by one
program, so results are deterministic.

Shapes: b batch, s slots, g global slots, m documents in a row, h heads, d head dimension, p pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.sparse.documents import NO_DOCUMENT, Layout
from mdseq.sparse.pattern import Pattern

HEAD_DIMS = (16, 32, 64, 128)
# Pieces of a document that its global slots meet in parallel: as many as make some hundred programs in all.
MAX_PIECES = 64
PIECE_PROGRAMS = 512
MIN_PIECE = 256
# Blocks of global slots, for documents of a handful and for documents of many.
FEW_GLOBALS, MANY_GLOBALS = 16, 64


def attend_fused(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    plan = FusedPlan.of(pattern, layout, q_bshd.shape[2])
    out_bshd: Tensor = _Fused.apply(q_bshd, k_bshd, v_bshd, plan)
    return out_bshd


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work, and Triton's own settings.

    Attributes:
        rows: Of a tile.
        block: Rows that it meets at a time.
        registers: Of a thread, at most, so that more tiles fit on a multiprocessor; None for no limit.
    """

    rows: int
    block: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> Tiles:
        """The fastest of some dozen on an H100, at windows of 256; within what smaller GPUs have of shared memory."""
        if dtype == torch.float32:
            if head_dim <= 64:
                return cls(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1))
            return cls(Tile(64, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))
        if head_dim <= 64:
            return cls(Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2, registers=168))
        return cls(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))


@dataclass(frozen=True)
class FusedPlan:
    """What the kernels need to know about a layout and a pattern.

    Attributes:
        ranges_bns: int32 [b, 4, s]: of each slot's document, the first token and the one behind the last, counted from
            the row's first token, then the first global slot and the one behind the last. All 0 at slots of none.
        num_global: Global slots of a row (g).
        window: Keys per side; as many as a row has slots where there is no limit.
        groups: First head, number of heads, dilation.
        pieces: p.
        global_block: Global slots that a program has, or meets, at a time.
    """

    ranges_bns: Tensor
    num_global: int
    window: int
    groups: tuple[tuple[int, int, int], ...]
    pieces: int
    global_block: int

    @classmethod
    def of(cls, pattern: Pattern, layout: Layout, num_heads: int) -> FusedPlan:
        num_slots = layout.document_bs.shape[1]
        num_tokens = num_slots - layout.num_global
        groups: list[tuple[int, int, int]] = []
        for heads, dilation in pattern.groups(num_heads):
            # No more residue classes than tokens: beyond that, each has a class of its own all the same.
            dilation = 1 if pattern.window is None else min(dilation, num_tokens)
            if groups and groups[-1][2] == dilation:
                groups[-1] = (groups[-1][0], heads.stop - groups[-1][0], dilation)
            else:
                groups.append((heads.start, heads.stop - heads.start, dilation))
        return cls(
            layout.plan("fused", lambda: document_ranges(layout)),
            layout.num_global,
            num_slots if pattern.window is None else min(pattern.window, num_slots),
            tuple(groups),
            max(1, min(MAX_PIECES, num_slots // MIN_PIECE, PIECE_PROGRAMS // max(layout.num_global, 1))),
            FEW_GLOBALS if layout.num_global <= FEW_GLOBALS * layout.num_documents else MANY_GLOBALS,
        )

    def token_launches(self, like_bshd: Tensor, tile: Tile) -> list[Launch]:
        """A program for each tile of each residue class in each head; heads run fastest, as they do in memory."""
        b, s, _, _ = like_bshd.shape
        launches = []
        for first_head, num_heads, dilation in self.groups:
            longest_class = -(-(s - self.num_global) // dilation)
            grid = (dilation * -(-longest_class // tile.rows) * num_heads, 1, b)
            numbers = (s, self.num_global, first_head, num_heads, dilation, self.window, 1)
            launches.append(Launch(grid, numbers, self._constants(like_bshd, tile, is_global=False)))
        return launches

    def global_launch(self, like_bshd: Tensor, tile: Tile) -> Launch:
        """A program for each tile of the global slots in each head and piece."""
        b, s, h, _ = like_bshd.shape
        tile = replace(tile, rows=self.global_block)
        grid = (-(-self.num_global // tile.rows) * h, self.pieces, b)
        numbers = (s, self.num_global, 0, h, 1, 0, self.pieces)
        return Launch(grid, numbers, self._constants(like_bshd, tile, is_global=True))

    def parts(self, like_bshd: Tensor) -> Tensor:
        """Room for what the global slots find in their pieces: [b, p, g, h, d]."""
        b, _, h, d = like_bshd.shape
        return like_bshd.new_empty(b, self.pieces, self.num_global, h, d, dtype=torch.float32)

    def _constants(self, like_bshd: Tensor, tile: Tile, is_global: bool) -> dict[str, Any]:
        return {
            "ROWS": tile.rows,
            "BLOCK": tile.block,
            "GLOBAL_BLOCK": min(self.global_block, tile.block),
            "WIDTH": like_bshd.shape[3],
            "IS_GLOBAL": is_global,
            "HAS_GLOBAL": self.num_global > 0,
            # float32 as three products of tf32: as exact, on the matrix units.
            "PRECISION": "tf32x3" if like_bshd.dtype == torch.float32 else "tf32",
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        }


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid, the numbers that follow the strides, and its constants."""

    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


def document_ranges(layout: Layout) -> Tensor:
    """`FusedPlan.ranges_bns`."""
    document_bs, g = layout.document_bs, layout.num_global
    real_bs = document_bs != NO_DOCUMENT
    owner_bs = document_bs.clamp(min=0)

    def bounds(slots: slice) -> list[Tensor]:
        """Of each slot's document among these slots, in which documents stand one after the other."""
        count_bm = torch.zeros(len(document_bs), layout.num_documents, dtype=torch.long, device=document_bs.device)
        count_bm.scatter_add_(1, owner_bs[:, slots], real_bs[:, slots].long())
        stop_bm = count_bm.cumsum(1)
        return [(x_bm.gather(1, owner_bs) * real_bs).int() for x_bm in (stop_bm - count_bm, stop_bm)]

    return torch.stack(bounds(slice(g, None)) + bounds(slice(0, g)), dim=1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, plan: FusedPlan) -> Tensor:
        inputs = tuple(_with_whole_rows(x) for x in (q_bshd, k_bshd, v_bshd))
        with torch.cuda.device_of(q_bshd):
            out_bshd, lse_bhs = _forward(plan, *inputs)
        ctx.save_for_backward(*inputs, out_bshd, lse_bhs)
        ctx.plan = plan
        return out_bshd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bshd: Tensor) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(grad_bshd):
            return (*_backward(ctx.plan, _with_whole_rows(grad_bshd), *ctx.saved_tensors), None)


def _forward(plan: FusedPlan, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and its lse, [b, h, s], in binary logarithms."""
    from mdseq.sparse.fused_forward import forward_kernel, merge_kernel

    b, s, h, d = q_bshd.shape
    tile = Tiles.of(d, q_bshd.dtype).forward
    out_bshd = q_bshd.new_empty(b, s, h, d)
    lse_bhs = q_bshd.new_empty(b, h, s, dtype=torch.float32)
    strides = _strides(q_bshd, k_bshd, v_bshd)

    def run(launch: Launch, out_bpshd: Tensor, lse_bphs: Tensor) -> None:
        forward_kernel[launch.grid](
            q_bshd, k_bshd, v_bshd, out_bpshd, lse_bphs, plan.ranges_bns,
            *strides, *out_bpshd.stride()[:4], *lse_bphs.stride()[:3], *launch.numbers, _scale(d), **launch.constants,
        )  # fmt: skip

    for launch in plan.token_launches(q_bshd, tile):
        run(launch, out_bshd[:, None], lse_bhs[:, None])
    if plan.num_global:
        part_bpghd = plan.parts(q_bshd)
        part_lse_bphg = lse_bhs.new_empty(b, plan.pieces, h, plan.num_global)
        run(plan.global_launch(q_bshd, tile), part_bpghd, part_lse_bphg)
        merge_kernel[(plan.num_global, h, b)](
            part_bpghd, part_lse_bphg, out_bshd, lse_bhs, *_strides(out_bshd), *lse_bhs.stride()[:2],
            plan.num_global, h, plan.pieces, PIECES=MAX_PIECES, WIDTH=d,
        )  # fmt: skip
    return out_bshd, lse_bhs


def _backward(
    plan: FusedPlan,
    grad_bshd: Tensor,
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshd: Tensor,
    out_bshd: Tensor,
    lse_bhs: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    from mdseq.sparse.fused_backward import key_gradient_kernel, query_gradient_kernel, sum_kernel

    b, _, h, d = q_bshd.shape
    tiles = Tiles.of(d, q_bshd.dtype)
    grad_q, grad_k, grad_v = (torch.empty_like(out_bshd) for _ in range(3))
    delta_bhs = torch.empty_like(lse_bhs)
    strides = _strides(q_bshd, k_bshd, v_bshd, grad_bshd)
    scales = (_scale(d), d**-0.5)

    # Queries first: on the way they leave delta, which keys need.
    def run_queries(launch: Launch, to_bpshd: Tensor) -> None:
        query_gradient_kernel[launch.grid](
            q_bshd, k_bshd, v_bshd, out_bshd, grad_bshd, lse_bhs, delta_bhs, to_bpshd, plan.ranges_bns,
            *strides, *_strides(out_bshd), *to_bpshd.stride()[:4], *lse_bhs.stride()[:2],
            *launch.numbers, *scales, **launch.constants,
        )  # fmt: skip

    def run_keys(launch: Launch, to_k_bpshd: Tensor, to_v_bpshd: Tensor) -> None:
        key_gradient_kernel[launch.grid](
            q_bshd, k_bshd, v_bshd, grad_bshd, lse_bhs, delta_bhs, to_k_bpshd, to_v_bpshd, plan.ranges_bns,
            *strides, *to_k_bpshd.stride()[:4], *lse_bhs.stride()[:2],
            *launch.numbers, *scales, **launch.constants,
        )  # fmt: skip

    parts = [plan.parts(q_bshd) for _ in range(3)] if plan.num_global else []
    for launch in plan.token_launches(q_bshd, tiles.query_gradient):
        run_queries(launch, grad_q[:, None])
    if parts:
        run_queries(plan.global_launch(q_bshd, tiles.query_gradient), parts[0])
    for launch in plan.token_launches(q_bshd, tiles.key_gradient):
        run_keys(launch, grad_k[:, None], grad_v[:, None])
    if parts:
        run_keys(plan.global_launch(q_bshd, tiles.key_gradient), parts[1], parts[2])
        sum_kernel[(plan.num_global, h, b)](
            *parts, grad_q, grad_k, grad_v, *_strides(grad_q), plan.num_global, h, plan.pieces,
            PIECES=MAX_PIECES, WIDTH=d,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _scale(head_dim: int) -> float:
    """Of scores, for exp2 in place of exp."""
    return head_dim**-0.5 * math.log2(math.e)


def _strides(*tensors_bshd: Tensor) -> tuple[int, ...]:
    return tuple(stride for x_bshd in tensors_bshd for stride in x_bshd.stride()[:3])


def _with_whole_rows(x_bshd: Tensor) -> Tensor:
    """The kernels take any stride but that of the last dimension."""
    return x_bshd if x_bshd.stride(3) == 1 else x_bshd.contiguous()
