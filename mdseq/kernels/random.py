# mypy: ignore-errors
"""Triton kernels of the keyed draws that mdseq/noise.py defines: the same words, and one launch a draw.

The plain version takes a hundred operations on int64 for the rounds of Philox alone, each a launch and a pass over
memory.

Shapes: b batch, l length, n = b * l positions, d values of a position, p = d / 2 pairs of them, rounded up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(2.0**-24)
TWO_PI = tl.constexpr(6.283185307179586)
# Integers that vary from call to call: Triton shall not compile a kernel anew for each that is 1 or a multiple of 16.
VARYING = ("num_positions", "length", "seed", "purpose", "step")


def normal(seed: int, purpose: int, step: int, row_b: Tensor, length: int, dim: int) -> Tensor:
    """`NoiseKey.normal`."""
    out_bld = torch.empty(len(row_b), length, dim, dtype=torch.float32, device=row_b.device)
    if out_bld.numel():
        num_positions, pairs = len(row_b) * length, (dim + 1) // 2
        grid = (triton.cdiv(num_positions, 16), triton.cdiv(pairs, 64))
        with torch.cuda.device_of(row_b):
            _normal_kernel[grid](
                out_bld, row_b.contiguous(), num_positions, length, seed, purpose, step, dim, POSITIONS=16, PAIRS=64
            )
    return out_bld


def uniform(seed: int, purpose: int, step: int, row_b: Tensor, length: int) -> Tensor:
    """`NoiseKey.uniform`."""
    out_bl = torch.empty(len(row_b), length, dtype=torch.float32, device=row_b.device)
    if out_bl.numel():
        grid = (triton.cdiv(out_bl.numel(), 256),)
        with torch.cuda.device_of(row_b):
            _uniform_kernel[grid](
                out_bl, row_b.contiguous(), out_bl.numel(), length, seed, purpose, step, POSITIONS=256
            )
    return out_bl


@triton.jit
def philox(index, position, row, step, seed, purpose):
    """The four words, uint32, of a counter and a key; of each number, its lower 32 bits."""
    return tl.philox_impl(
        index.to(tl.uint32), position.to(tl.uint32), row.to(tl.uint32), step.to(tl.uint32),
        seed.to(tl.uint32), purpose.to(tl.uint32),
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _normal_kernel(
    out, row_b, num_positions, length, seed, purpose, step, dim, POSITIONS: tl.constexpr, PAIRS: tl.constexpr
):
    """Box-Muller: of the pair (i, i + p), word i is the radius, word i + p the angle."""
    n = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    exists_n = n < num_positions
    position_n1 = (n % length)[:, None]
    row_n1 = tl.load(row_b + n // length, mask=exists_n, other=0)[:, None]
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    pairs = (dim + 1) // 2
    counters = (2 * pairs + 3) // 4
    radius_np = _unit(_word(pair, counters, position_n1, row_n1, step, seed, purpose))
    angle_np = TWO_PI * _unit(_word(pair + pairs, counters, position_n1, row_n1, step, seed, purpose))
    radius_np = tl.sqrt_rn(-2.0 * tl.log(radius_np))
    exists_np = exists_n[:, None] & (pair < pairs)[None, :]
    at_np = out + n[:, None] * dim + pair[None, :]
    tl.store(at_np, radius_np * tl.cos(angle_np), mask=exists_np)
    tl.store(at_np + pairs, radius_np * tl.sin(angle_np), mask=exists_np & (pair + pairs < dim)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _uniform_kernel(out, row_b, num_positions, length, seed, purpose, step, POSITIONS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    exists_n = n < num_positions
    row_n = tl.load(row_b + n // length, mask=exists_n, other=0)
    word_n, _, _, _ = philox(tl.zeros_like(n), n % length, row_n, step, seed, purpose)
    tl.store(out + n, _unit(word_n), mask=exists_n)


@triton.jit
def _word(index, counters, position_n1, row_n1, step, seed, purpose):
    """Words of each position, which are laid out as the first of all counters, the second of all, and so on: [n, i]."""
    counter, place = (index % counters)[None, :], (index // counters)[None, :]
    first, second, third, fourth = philox(counter, position_n1, row_n1, step, seed, purpose)
    return tl.where(place < 2, tl.where(place == 0, first, second), tl.where(place == 2, third, fourth))


@triton.jit
def _unit(word):
    return ((word >> 8) + 1).to(tl.float32) * UNIT
