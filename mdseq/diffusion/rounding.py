"""Between embeddings and tokens: cross-entropy, the likeliest token, the nearest embedding, the mean embedding.

The logits of the whole vocabulary exist for some millions of values at a time, in the forward and in the backward pass,
so that memory does not grow with the product of length and vocabulary. All arithmetic is in fp32, or in fp64 where an
input is.

Shapes: b batch, l length, n positions, c positions of a chunk, z embedding dimension, y dimension of scores, v
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.data.tokenizer import SpecialToken
from mdseq.kernels import softmax_numerators, softmax_slope
from mdseq.kernels.softmax import CHUNK_LOGITS, CHUNK_LOGITS_ON_GPU
from mdseq.model.denoiser import Vocabulary

# What never stands in a target, and so must never be generated.
NOT_TARGETS: list[int] = [SpecialToken.PAD, SpecialToken.UNK, SpecialToken.BOS, SpecialToken.SEP]


def cross_entropy(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weight * -log p(token | x), and each -log p without gradient, [n].

    p is the softmax of x @ embedding.T + bias. Gradients reach x, the embeddings and the biases, not the weights; they
    have none of their own. Where the weight is 0, nothing is computed that could be avoided: -log p is given as 0, and
    x may be anything, NaN included.
    """
    counted = _counted(weight_n)
    loss, counted_loss_n = _CrossEntropy.apply(
        x_nz[counted],
        vocabulary.embedding_vz,
        vocabulary.bias_v,
        token_n[counted],
        weight_n[counted],
        torch.is_grad_enabled(),
    )
    loss_n = counted_loss_n.new_zeros(len(x_nz))
    loss_n[counted] = counted_loss_n
    return loss, loss_n


@torch.no_grad()
def likeliest_tokens(
    x_blz: Tensor, vocabulary: Vocabulary, forbidden: list[int] = NOT_TARGETS
) -> tuple[Tensor, Tensor]:
    """The token of the largest p(token | x), int64 [b, l], and that p, fp32 [b, l]; those forbidden have none.

    Of equally likely tokens, the first.
    """
    parts = []
    for logits_cv in _allowed_logits(x_blz, vocabulary.embedding_vz, vocabulary.bias_v, forbidden):
        largest_c, token_c = logits_cv.max(dim=1)
        confidence_c = logits_cv.sub_(largest_c[:, None]).exp_().sum(dim=1).reciprocal()
        parts.append((token_c, confidence_c.float()))
    token_bl, confidence_bl = (torch.cat(part).view(x_blz.shape[:-1]) for part in zip(*parts, strict=True))
    return token_bl, confidence_bl


@torch.no_grad()
def nearest_tokens(x_blz: Tensor, embedding_vz: Tensor, forbidden: list[int] = NOT_TARGETS) -> Tensor:
    """The token whose embedding is nearest in Euclidean distance, int64 [b, l]; of equally near ones, the first.

    |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2), of which the first term does not matter.
    """
    score_cvs = _allowed_logits(x_blz, embedding_vz, -0.5 * embedding_vz.square().sum(dim=1), forbidden)
    return torch.cat([score_cv.argmax(dim=1) for score_cv in score_cvs]).view(x_blz.shape[:-1])


@torch.no_grad()
def mean_embedding(score_ny: Tensor, scored: Vocabulary, embedding_vz: Tensor) -> Tensor:
    """The mean of the embeddings under p(token | score) = softmax(score @ scored.embedding.T + bias), [n, z]."""
    means = []
    for logits_cv in _allowed_logits(score_ny, scored.embedding_vz, scored.bias_v, []):
        total_c = softmax_numerators(logits_cv)
        means.append(logits_cv @ embedding_vz.to(logits_cv.dtype) / total_c[:, None])
    return torch.cat(means).to(score_ny.dtype)


class _CrossEntropy(torch.autograd.Function):
    """The sum of weight * -log p, and each -log p.

    As the weights are known beforehand, the forward pass computes the gradients too, while it has the logits of a chunk
    (as Liger Kernel's fused linear cross-entropy, arXiv 2410.10989); the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_nz: Tensor,
        embedding_vz: Tensor,
        bias_v: Tensor,
        token_n: Tensor,
        weight_n: Tensor,
        grad_enabled: bool,  # ctx.needs_input_grad does not know
    ) -> tuple[Tensor, Tensor]:
        differentiate = grad_enabled and any(ctx.needs_input_grad)
        dtype = _dtype(x_nz, embedding_vz, bias_v)
        embedding_vz, bias_v, weight_n = embedding_vz.to(dtype), bias_v.to(dtype), weight_n.to(dtype)
        loss_n = torch.empty_like(weight_n)
        if differentiate:
            x_grad_nz, embedding_grad_vz = torch.empty_like(x_nz), torch.zeros_like(embedding_vz)
            bias_grad_v = torch.zeros_like(bias_v)

        for chunk, logits_cv in _chunks(len(x_nz), len(bias_v), dtype, x_nz.device):
            weight_c = weight_n[chunk]
            x_cz = torch.where(weight_c[:, None] != 0, x_nz[chunk].to(dtype), 0.0)  # 0 * NaN would not be 0
            torch.addmm(bias_v, x_cz, embedding_vz.T, out=logits_cv)
            total_c, loss_c = softmax_slope(logits_cv, token_n[chunk], differentiate)
            loss_n[chunk] = torch.where(weight_c != 0, loss_c, 0.0)

            if differentiate:
                # d loss / d logits = weight * (p - onehot) = scale * (exp - total * onehot). The scale waits until
                # there is less to multiply.
                slope_cv, scale_c = logits_cv, weight_c / total_c
                x_grad_nz[chunk] = scale_c[:, None] * (slope_cv @ embedding_vz)
                embedding_grad_vz.addmm_(slope_cv.T, scale_c[:, None] * x_cz)
                bias_grad_v.addmv_(slope_cv.T, scale_c)

        if differentiate:
            ctx.save_for_backward(x_grad_nz, embedding_grad_vz, bias_grad_v)
        ctx.mark_non_differentiable(loss_n)
        return (weight_n * loss_n).sum(), loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_grad_nz, embedding_grad_vz, bias_grad_v = ctx.saved_tensors
        return gradient * x_grad_nz, gradient * embedding_grad_vz, gradient * bias_grad_v, None, None, None


def _counted(weight_n: Tensor) -> Tensor | slice:
    """The positions whose weight is not 0, or all where the host would have to wait for the device to know them."""
    return slice(None) if weight_n.is_cuda else weight_n.nonzero().squeeze(1)


def _allowed_logits(x_blz: Tensor, embedding_vz: Tensor, bias_v: Tensor, forbidden: list[int]) -> Iterator[Tensor]:
    """Logits of one chunk of positions after the other, in the same memory; -inf for forbidden tokens."""
    x_nz, dtype = x_blz.flatten(end_dim=-2), _dtype(x_blz, embedding_vz, bias_v)
    embedding_vz, bias_v = embedding_vz.to(dtype), bias_v.to(dtype, copy=True)
    bias_v[forbidden] = -torch.inf
    for chunk, logits_cv in _chunks(len(x_nz), len(bias_v), dtype, x_nz.device):
        yield torch.addmm(bias_v, x_nz[chunk].to(dtype), embedding_vz.T, out=logits_cv)


def _chunks(
    num_positions: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Cut the positions into chunks, at least one, each with room for its logits [c, v]: the same memory for all."""
    size = max(1, (CHUNK_LOGITS_ON_GPU if device.type == "cuda" else CHUNK_LOGITS) // vocab_size)
    room_cv = torch.empty(min(size, num_positions), vocab_size, dtype=dtype, device=device)
    for start in range(0, max(1, num_positions), size):
        yield slice(start, start + size), room_cv[: num_positions - start]


def _dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
