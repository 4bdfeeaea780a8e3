"""From a denoiser's output f to the probabilities of tokens, and to an estimate of the clean embedding.

    output     the estimate is f itself (DiffuSeq)
    softmax    the mean embedding under p(v) = softmax(f . e_v + bias), the probabilities that `anchor_weight` trains
               (score interpolation, CDCD, arXiv 2211.15089, section 3.1)
    posterior  the same under p(v) ~ softmax(f . e_v + bias) N(z_t; alpha (e_v - m) + m, sigma^2): what a noisy
               embedding says of its own token is Bayes' rule, and only what the others say is learned (the output
               prior of Plaid, arXiv 2305.18619)

A position that was replaced by m, so that z_t - m is exactly zero, says nothing of its token.

Shapes: b rows, l length, z embedding dimension, v vocabulary, n positions, y dimension of scores: z, or z + 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mdseq.diffusion.rounding import mean_embedding
from mdseq.diffusion.schedule import alpha_sigma_of
from mdseq.model.denoiser import Vocabulary

Reading = Literal["output", "softmax", "posterior"]
READINGS: tuple[Reading, ...] = get_args(Reading)
# The posterior takes one dimension more; with this many, the others zero, rows stay multiples of 32 bytes, which a GPU
# multiplies several times as fast as others.
MORE_DIMENSIONS = 8


@dataclass(frozen=True)
class Reader:
    """One way to read f.

    Attributes:
        reading: Which.
        embedding_vz: Embeddings of all tokens.
        scored: What scores are multiplied with: softmax(score @ embedding.T + bias) are the probabilities. For the
            posterior, embeddings have |e|^2 as a dimension more.
        m_z: The absorbing state.
    """

    reading: Reading
    embedding_vz: Tensor
    scored: Vocabulary
    m_z: Tensor

    @classmethod
    def of(cls, reading: Reading, vocabulary: Vocabulary, m_z: Tensor) -> Reader:
        scored = with_square(vocabulary) if reading == "posterior" else vocabulary
        return cls(reading, vocabulary.embedding_vz, scored, m_z)

    def scores(self, f_blz: Tensor, z_blz: Tensor, log_snr_bl: Tensor) -> Tensor:
        """The scores of f [b, l, y], given the noisy embeddings and lambda = log(alpha / sigma) of each position."""
        if self.reading != "posterior":
            return f_blz
        seen_bl1 = (z_blz != self.m_z).any(dim=-1, keepdim=True)
        evidence_bly = evidence(z_blz, log_snr_bl, self.m_z) * seen_bl1
        z = f_blz.shape[-1]
        return torch.cat([f_blz + evidence_bly[..., :z], evidence_bly[..., z:]], dim=-1)

    def clean(self, f_blz: Tensor, scores_bly: Tensor, target_bl: Tensor) -> Tensor:
        """The estimate of the clean embeddings at targets, [b, l, z], without gradient unless it is f."""
        if self.reading == "output":
            return f_blz
        if f_blz.is_cuda:  # the host would wait to know how many targets there are
            return mean_embedding(scores_bly.flatten(0, 1), self.scored, self.embedding_vz).view_as(f_blz)
        estimate_blz = torch.zeros_like(f_blz)
        estimate_blz[target_bl] = mean_embedding(scores_bly[target_bl], self.scored, self.embedding_vz)
        return estimate_blz


def with_square(vocabulary: Vocabulary) -> Vocabulary:
    """The same with MORE_DIMENSIONS of every embedding, the first of them -|e|^2 / 2."""
    half_square_v1 = -0.5 * vocabulary.embedding_vz.square().sum(dim=1, keepdim=True)
    return Vocabulary(torch.cat([vocabulary.embedding_vz, _padded(half_square_v1)], dim=1), vocabulary.bias_v)


def evidence(z_blz: Tensor, log_snr_bl: Tensor, m_z: Tensor) -> Tensor:
    """Scores of log N(z; alpha (e - m) + m, sigma^2), but for what does not depend on e: [b, l, y], fp32.

    log N = alpha / sigma^2 (z - (1 - alpha) m) . e - (alpha / sigma)^2 |e|^2 / 2 + ...
    """
    alpha_bl1, sigma_bl1 = (value[..., None].float() for value in alpha_sigma_of(log_snr_bl))
    strength_bl1 = (2 * log_snr_bl).exp()[..., None].float()
    of_embedding_blz = alpha_bl1 / sigma_bl1**2 * (z_blz - (1 - alpha_bl1) * m_z)
    return torch.cat([of_embedding_blz, _padded(strength_bl1)], dim=-1)


def _padded(column: Tensor) -> Tensor:
    """[..., 1] to [..., MORE_DIMENSIONS]."""
    return F.pad(column, (0, MORE_DIMENSIONS - 1))
