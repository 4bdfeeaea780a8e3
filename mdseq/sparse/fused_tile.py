# mypy: ignore-errors
"""What the fused engine's kernels share: a program's tile of rows, and the ranges of slots that it meets.

A tile is a number of rows that stand side by side: tokens of one residue class, or global slots. Each row meets a range
of tokens of its class and a range of global slots, both of its document. "Meets" is symmetric: a key meets the queries
of its ranges just as a query meets its keys, so all kernels walk the ranges in the same way. Between the two ends of a
tile's range, which only some of its rows meet, are whole blocks that all rows meet: they need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)
# Integers that vary from call to call: Triton shall not compile a kernel anew for each that is 1 or a multiple of 16.
VARYING = (
    *("num_slots", "num_global", "first_head", "group_heads", "dilation", "window", "pieces"),
    *("stride_lb", "stride_lp", "stride_lh"),
)
VARYING_OF_PARTS = ("num_global", "num_heads", "pieces", "stride_lb", "stride_lh")


@triton.jit
def tile_of(
    ranges, num_slots, num_global, first_head, group_heads, dilation, window, pieces,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """This program's tile, and the part of its range of tokens that is this program's piece.

    Returns:
        batch, head, piece: Of this program.
        start: Position of the tile's first row in its residue class.
        slot, exists: Of each row; whether the row has such a slot.
        class_slot, class_token: First slot of the rows' class, and of the class of tokens that they meet.
        first, stop: The first position in that class that each row meets, and the one behind the last.
        begin, full, full_end, end: The same of the tile; all rows meet all of `full` to before `full_end`.
    """
    tile, head = tl.program_id(0) // group_heads, first_head + tl.program_id(0) % group_heads
    piece, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    residue = tile % dilation
    start = tile // dilation * ROWS
    position = start + tl.arange(0, ROWS)
    class_token = num_global + residue
    class_slot = residue if IS_GLOBAL else class_token
    slot = class_slot + position * dilation
    exists = slot < (num_global if IS_GLOBAL else num_slots)
    ranges += batch * 4 * num_slots
    first = tl.load(ranges + slot, mask=exists, other=0)
    stop = tl.load(ranges + num_slots + slot, mask=exists, other=0)
    if not IS_GLOBAL:
        first = tl.maximum((first - residue + dilation - 1) // dilation, position - window)
        stop = tl.minimum((stop - residue + dilation - 1) // dilation, position + window + 1)

    begin, end = _hull(first, stop)
    if IS_GLOBAL:
        length = tl.cdiv(tl.cdiv(end - begin, pieces), BLOCK) * BLOCK  # whole blocks: no block is of two pieces
        begin = tl.minimum(begin + piece * length, end)
        end = tl.minimum(begin + length, end)
    all_first = tl.max(tl.where(exists, first, 0), 0)
    all_stop = tl.minimum(tl.min(tl.where(exists, stop, FAR), 0), end)
    full = tl.minimum(begin + tl.cdiv(tl.maximum(all_first - begin, 0), BLOCK) * BLOCK, end)
    full_end = tl.maximum(begin + tl.maximum(all_stop - begin, 0) // BLOCK * BLOCK, full)
    class_slot, class_token = class_slot.to(tl.int64), class_token.to(tl.int64)
    return batch, head, piece, start, slot, exists, class_slot, class_token, first, stop, begin, full, full_end, end


@triton.jit
def global_range(ranges, num_slots, slot, wanted):
    """The global slots that each row meets, first and stop, and the tile, begin and end."""
    first = tl.load(ranges + 2 * num_slots + slot, mask=wanted, other=0)
    stop = tl.load(ranges + 3 * num_slots + slot, mask=wanted, other=0)
    begin, end = _hull(first, stop)
    return first, stop, begin, end


@triton.jit
def _hull(first, stop):
    end = tl.max(tl.where(first < stop, stop, 0), 0)
    return tl.minimum(tl.min(tl.where(first < stop, first, FAR), 0), end), end


@triton.jit
def rows_of(base, start, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows from `start` on; only the first may be further away than an int32 can tell."""
    row = tl.arange(0, ROWS)[:, None]
    return base + tl.cast(start, tl.int64) * stride + row * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_rows(pointers, exists, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_part(part, row, exists, index, head, num_global, num_heads, WIDTH: tl.constexpr):
    """Of one global slot in one head, what each of its pieces found, of [b * p, g, h, d]: [pieces, WIDTH]."""
    pointers = part + ((row * num_global + index) * num_heads + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointers, mask=exists[:, None], other=0.0)


@triton.jit
def sees(first, stop, position):
    """Which position each row meets, [rows, positions]."""
    return (position[None, :] >= first[:, None]) & (position[None, :] < stop[:, None])
