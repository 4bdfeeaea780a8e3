# mypy: ignore-errors
"""Triton kernel of the softmax of logits; their rows are contiguous, [rows, WIDTH], and each is one program's."""

from __future__ import annotations

import triton
import triton.language as tl

# Of float32. A maximum that starts here, not at -inf, never makes a difference -inf - -inf = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def softmax_kernel(
    logits, token, total, loss, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr
):  # fmt: skip
    """exp(logit - largest) in place if WRITE, and its sum; with tokens, less their onehot times that sum, and the loss.

    Each of BLOCK lanes keeps the largest of its logits and the sum of exp(logit - largest), which shrinks when the
    largest grows (Milakov and Gimelshein, arXiv 1805.02867); only at the end do lanes wait for each other. NaN or +inf
    in a row makes its sum NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * WIDTH
    if token is not None:
        of_token = tl.load(token + row)
        token_logit = tl.load(logits + of_token)  # before it is written over

    largest = tl.full([BLOCK], LOWEST, tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, mask=column < WIDTH, other=-float("inf"))
        grows = logit > largest
        shrunk = tl.exp(-tl.abs(logit - largest))  # the smaller of the two beside the larger
        summed = tl.where(grows, summed * shrunk + 1.0, summed + shrunk)
        largest = tl.where(grows, logit, largest)
    top = tl.max(largest, 0)
    row_total = tl.sum(summed * tl.exp(largest - top), 0)

    tl.store(total + row, row_total)
    if token is not None:
        tl.store(loss + row, tl.log(row_total) - (token_logit - top))
    if WRITE:
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            numerator = tl.exp(tl.load(logits + column, mask=column < WIDTH, other=-float("inf")) - top)
            if token is not None:
                numerator -= tl.where(column == of_token, row_total, 0.0)
            tl.store(logits + column, numerator, mask=column < WIDTH)
