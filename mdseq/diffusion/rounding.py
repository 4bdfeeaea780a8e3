"""Between embeddings and tokens: cross-entropy, the likeliest token, the nearest embedding.

The logits of the whole vocabulary exist for CHUNK_LOGITS values at a time, in the forward and in the backward pass, so
that memory does not grow with the product of length and vocabulary.

Shapes: b batch, l length, n positions, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken
from mdseq.model.denoiser import Vocabulary

# What never stands in a target, and so must never be generated.
NOT_TARGETS = [SpecialToken.PAD, SpecialToken.UNK, SpecialToken.BOS, SpecialToken.SEP]


def cross_entropy(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weight * -log p(token | x), and each -log p without gradient, [n].

    p is the softmax of x @ embedding.T + bias. Gradients reach x, the embeddings and the biases, not the weights.
    """
    logits_nv = x_nz @ vocabulary.embedding_vz.T + vocabulary.bias_v
    loss_n = F.cross_entropy(logits_nv, token_n, reduction="none")
    return (weight_n * loss_n).sum(), loss_n.detach()


def likeliest_tokens(
    x_blz: Tensor, vocabulary: Vocabulary, forbidden: list[int] = NOT_TARGETS
) -> tuple[Tensor, Tensor]:
    """The token of the largest p(token | x), int64 [b, l], and that p, fp32 [b, l]; those forbidden have none."""
    logits_blv = x_blz @ vocabulary.embedding_vz.T + vocabulary.bias_v
    logits_blv[..., forbidden] = -torch.inf
    confidence_bl, token_bl = logits_blv.softmax(dim=-1).max(dim=-1)
    return token_bl, confidence_bl


def nearest_tokens(x_blz: Tensor, vocabulary: Vocabulary, forbidden: list[int] = NOT_TARGETS) -> Tensor:
    """The token whose embedding is nearest in Euclidean distance, int64 [b, l].

    |x - e|^2 = |x|^2 - 2 x.e + |e|^2, of which the first term does not matter.
    """
    embedding_vz = vocabulary.embedding_vz
    score_blv = x_blz @ embedding_vz.T - 0.5 * embedding_vz.square().sum(dim=-1)
    score_blv[..., forbidden] = -torch.inf
    return score_blv.argmax(dim=-1)
