"""Softmax of rows of logits, in their own memory and without its division: numerators, totals, and cross-entropy.

p = exp / total with exp = exp(logit - largest logit), which cannot overflow. Whoever multiplies a matrix [c, v] with
something smaller does better to divide by the total there. Taken one after the other on a GPU, maximum, difference,
exponential and sum read all logits four times and write them twice; the kernel reads them twice and writes them once.

Shapes: c positions, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.kernels.launch import has_kernels

# Logits that exist at a time: 32 MiB in fp32. Alone on a CPU, chunks of 8 to 32 MiB are about as fast; where threads
# are more than free cores, each operation waits for the last thread, and the fewer there are, the better.
CHUNK_LOGITS = 2**23
# 256 MiB, little beside a GPU's memory. Each chunk is a dozen kernels, and they must take longer than to launch them.
CHUNK_LOGITS_ON_GPU = 2**26
# Logits that a program reads at once: 16 a thread, enough of them on the way to keep memory busy.
BLOCK, NUM_WARPS = 4096, 8


def softmax_numerators(logits_cv: Tensor) -> Tensor:
    """Replace each logit by exp(logit - largest of its row).

    Args:
        logits_cv: fp32 or fp64, contiguous.

    Returns:
        The totals of the rows, [c].
    """
    return fused_numerators(logits_cv) if has_kernels(logits_cv) else plain_numerators(logits_cv)


def softmax_slope(logits_cv: Tensor, token_c: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Replace logits by the slope of the cross-entropy, d loss / d logits = p - onehot(token), times the total.

    That is exp - total * onehot(token).

    Args:
        logits_cv: fp32 or fp64, contiguous.
        token_c: The column that is right in each row, int64.
        differentiate: False if only the results matter, and what stands in the logits afterwards does not.

    Returns:
        The totals, and loss = -log p(token), both [c].
    """
    slope = fused_slope if has_kernels(logits_cv) else plain_slope
    return slope(logits_cv, token_c, differentiate)


def plain_numerators(logits_cv: Tensor) -> Tensor:
    return logits_cv.sub_(logits_cv.amax(dim=1, keepdim=True)).exp_().sum(dim=1)


def plain_slope(logits_cv: Tensor, token_c: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    token_c1 = token_c[:, None]
    logits_cv.sub_(logits_cv.amax(dim=1, keepdim=True))
    token_logit_c1 = logits_cv.gather(1, token_c1)
    total_c1 = logits_cv.exp_().sum(dim=1, keepdim=True)
    loss_c1 = total_c1.log() - token_logit_c1
    if differentiate:
        logits_cv.scatter_add_(1, token_c1, -total_c1)
    return total_c1.squeeze(1), loss_c1.squeeze(1)


def fused_numerators(logits_cv: Tensor) -> Tensor:
    total_c = logits_cv.new_empty(len(logits_cv))
    _launch(logits_cv, None, total_c, None, write=True)
    return total_c


def fused_slope(logits_cv: Tensor, token_c: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    total_c, loss_c = logits_cv.new_empty(len(logits_cv)), logits_cv.new_empty(len(logits_cv))
    _launch(logits_cv, token_c.contiguous(), total_c, loss_c, write=differentiate)
    return total_c, loss_c


def _launch(logits_cv: Tensor, token_c: Tensor | None, total_c: Tensor, loss_c: Tensor | None, write: bool) -> None:
    from mdseq.kernels.fused_softmax import softmax_kernel

    assert logits_cv.is_contiguous()
    c, v = logits_cv.shape
    if c:
        with torch.cuda.device_of(logits_cv):
            softmax_kernel[c,](
                logits_cv, token_c, total_c, loss_c, WIDTH=v, BLOCK=BLOCK, WRITE=write, num_warps=NUM_WARPS
            )
