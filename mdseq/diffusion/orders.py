"""A bound on the negative log-likelihood of tokens that are absorbed one after the other, estimated without bias.

A model that guesses what is absorbed from what is not can write the n targets of a text in any order. In expectation
over all orders, as many tokens being absorbed as another number from 1 to n,

    -log p(w) <= n E[1 / |A| sum over i in A of -log p(w_i | z_t of the others)]

with A a random set of a random size (order-agnostic autoregressive models, arXiv 2110.02037, eq. 4 and 6). Tokens that
are not absorbed are noised as on the way of `mask_predict`, at t = |A| / n of it; as their noise is drawn anew for each
token, the model marginalises it, and the bound only becomes looser.

Shapes: b rows, l length, z embedding dimension, n absorbed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.diffusion.bound import RowDraws
from mdseq.diffusion.denoising import GivenRows
from mdseq.diffusion.rounding import cross_entropy


@torch.no_grad()
def absorbing_bound(given: GivenRows, tokens_bl: Tensor, draws: RowDraws, num_sets: int) -> Tensor:
    """One unbiased estimate of the bound of each row, float64 [b], in nats.

    Args:
        given: The rows. The embeddings of their targets are looked at only where they are noised.
        tokens_bl: int64.
        draws: What noise, and sets of tokens, are drawn by.
        num_sets: How many, their sizes spread evenly; the denoiser is called once for each, and twice by a model with
            self-conditioning.
    """
    model, target_bl = given.model, given.target_bl
    clean_blz = given.source_blz - model.m_z
    count_b = target_bl.sum(dim=1)
    nats_b = torch.zeros(len(count_b), dtype=torch.float64, device=count_b.device)
    for index, uniform_b in enumerate(draws.strata(num_sets)):
        size_b = (count_b * uniform_b).ceil()
        rank_bl = draws.uniform(index, target_bl.shape[1]).masked_fill(~target_bl, torch.inf).argsort().argsort()
        absorbed_bl = rank_bl < size_b[:, None]
        share_b = size_b / count_b.clamp(min=1)
        timestep_b = model.schedule.last * share_b
        alpha_b, sigma_b = model.schedule.alpha_sigma(timestep_b)
        noise_blz = draws.normal(index, clean_blz)
        u_blz = alpha_b[:, None, None] * clean_blz + sigma_b[:, None, None] * noise_blz
        z_blz = torch.where(absorbed_bl[..., None], 0.0, u_blz) + model.m_z
        prediction = given.predict(z_blz, timestep_b)
        if model.denoiser.config.self_conditioning:
            prediction = given.predict(z_blz, timestep_b, prediction.clean_blz)
        scores_ny = prediction.scores_bly[absorbed_bl]
        _, nats_n = cross_entropy(
            scores_ny, given.reader.scored, tokens_bl[absorbed_bl], torch.ones_like(scores_ny[:, 0])
        )
        row_n = absorbed_bl.nonzero()[:, 0]
        nats_b.index_add_(0, row_n, nats_n.double() / share_b[row_n])
    return nats_b / num_sets
