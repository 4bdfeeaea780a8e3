"""From embeddings to tokens.

Shapes: b batch, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken

# What never stands in a target, and so must never be generated.
NOT_TARGETS = [SpecialToken.PAD, SpecialToken.UNK, SpecialToken.BOS, SpecialToken.SEP]


def nearest_tokens(x_blz: Tensor, embedding_vz: Tensor) -> Tensor:
    """The token whose embedding is nearest in Euclidean distance, int64 [b, l].

    |x - e|^2 = |x|^2 - 2 x.e + |e|^2, of which the first term does not matter.
    """
    score_blv = x_blz @ embedding_vz.T - 0.5 * embedding_vz.square().sum(dim=-1)
    score_blv[..., NOT_TARGETS] = -torch.inf
    return score_blv.argmax(dim=-1)
