"""A bound on the negative log-likelihood of tokens under a diffusion of their embeddings, estimated without bias.

With lambda the log signal-to-noise ratio, which falls from `cleanest` to `noisiest`, u_0 = e - m the embedding of the
token w less the absorbing state, and u_lambda = alpha u_0 + sigma eps,

    -log p(w) <= KL(q(u_noisiest | w) || N(0, I))                                  prior
               + E[-log p(w | u_cleanest)]                                         reconstruction
               + integral of e^(2 lambda) E|u_0 - f(u_lambda)|^2 d lambda          denoising

for whatever f and whatever distribution p(w | u): the closer they are to what they stand for, the tighter the bound. It
is Diffusion-LM's (arXiv 2205.14217, eq. 4) without noise in the embedding, its sum over timesteps in the limit of
infinitely many: half the integral of |u_0 - f|^2 over the signal-to-noise ratio e^(2 lambda) (VDM, arXiv 2107.00630,
section 5).

Shapes: b rows, l length, z embedding dimension, k levels of noise, i intervals of lambda, n observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdseq.diffusion.schedule import alpha_sigma_of
from mdseq.noise import NoiseKey, Purpose

# The share of levels that are drawn evenly, whatever was fitted: no weight exceeds 1 / this times that of even draws.
EVEN_SHARE = 0.1
# One over the golden ratio: its multiples, modulo 1, fall into the largest gap left (the Weyl sequence).
_GOLDEN = 0.6180339887498949

Predict = Callable[[Tensor, Tensor], Tensor]
Reconstruct = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DiffusedRows:
    """Rows of targets, and the model of them that is judged.

    Attributes:
        clean_blz: u_0 = e - m, fp32; only target positions are looked at.
        target_bl: Positions that count.
        predict: f: from u_blz and lambda, float64 [b], to an estimate of `clean_blz`.
        reconstruct: From u_blz at lambda = cleanest to -log p(w | u) of each row's targets in nats, [b].
        noisiest, cleanest: The ends of lambda.
    """

    clean_blz: Tensor
    target_bl: Tensor
    predict: Predict
    reconstruct: Reconstruct
    noisiest: float
    cleanest: float


@dataclass(frozen=True)
class RowDraws:
    """What the noise of rows is drawn by; no two rows, and no two passes over them, may share a key.

    Attributes:
        seed: Below 2**32.
        pass_index: Below 2**15.
        row_b: int64, id of each row.
        document_b: int64, id of the document that each row is a part of.
        part_b: int64, which part.
    """

    seed: int
    pass_index: int
    row_b: Tensor
    document_b: Tensor
    part_b: Tensor

    def strata(self, count: int) -> Tensor:
        """Points of (0, 1), evenly spaced from a shift that is uniform for each document: float64 [k, b].

        The parts of a document shift it on, each into the largest gap that those before it left.
        """
        shift_b = self._key(0, self.document_b).uniform(Purpose.LIKELIHOOD, 1)[:, 0].double()
        shift_b = (shift_b + _GOLDEN * self.part_b) % 1.0
        return (torch.arange(count, device=shift_b.device)[:, None] + shift_b) / count

    def normal(self, index: int, like_blz: Tensor) -> Tensor:
        """The `index`-th standard normal draw of the pass, of the shape of `like_blz`."""
        return self._key(1 + index, self.row_b).normal(Purpose.LIKELIHOOD, *like_blz.shape[1:])

    def uniform(self, index: int, length: int) -> Tensor:
        """The `index`-th uniform draw of the pass, [b, length] in (0, 1]."""
        return self._key(1 + index, self.row_b).uniform(Purpose.ORDER, length)

    def _key(self, index: int, row_b: Tensor) -> NoiseKey:
        assert index < 2**16
        assert self.pass_index < 2**15
        return NoiseKey(self.seed, self.pass_index * 2**16 + index, row_b)


@dataclass(frozen=True)
class LevelDensity:
    """How levels of noise are drawn: a density over lambda, constant on each of some equal intervals.

    Whatever it is, the estimate has the same mean; its variance is least where the density is proportional to the
    integrand. It must be fixed before the estimate is made.

    Attributes:
        noisiest, cleanest: The ends of lambda.
        probability_i: float64, of each interval; none is zero.
    """

    noisiest: float
    cleanest: float
    probability_i: Tensor

    @classmethod
    def even(cls, noisiest: float, cleanest: float, num_intervals: int) -> LevelDensity:
        probability_i = torch.full((num_intervals,), 1.0 / num_intervals, dtype=torch.float64)
        return cls(noisiest, cleanest, probability_i)

    def fitted(self, log_snr_n: Tensor, integrand_n: Tensor) -> LevelDensity:
        """Proportional to the root mean square of what was observed in each interval, mixed with EVEN_SHARE of even.

        For independent draws that is the density of least variance.
        """
        count = len(self.probability_i)
        width = (self.cleanest - self.noisiest) / count
        interval_n = ((log_snr_n - self.noisiest) / width).long().clamp(0, count - 1)
        sum_i = torch.zeros_like(self.probability_i).index_add_(0, interval_n, integrand_n.double().square())
        seen_i = torch.zeros_like(sum_i).index_add_(0, interval_n, torch.ones_like(integrand_n).double())
        importance_i = (sum_i / seen_i.clamp(min=1)).sqrt()
        total = importance_i.sum()
        importance_i = importance_i / total if total > 0 else self.probability_i
        return replace(self, probability_i=(1 - EVEN_SHARE) * importance_i + EVEN_SHARE / count)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Lambda at these points of the cumulative distribution, and its density there: float64, of their shape."""
        probability_i = self.probability_i.to(uniform.device)
        count = len(probability_i)
        width = (self.cleanest - self.noisiest) / count
        end_i = probability_i.cumsum(0)
        interval = torch.searchsorted(end_i, uniform).clamp(max=count - 1)
        within = ((uniform - end_i[interval]) / probability_i[interval] + 1.0).clamp(0.0, 1.0)
        return self.noisiest + width * (interval + within), probability_i[interval] / width


@dataclass(frozen=True)
class BoundTerms:
    """The bound of each row, float64 [b], in nats."""

    prior_b: Tensor
    reconstruction_b: Tensor
    denoising_b: Tensor


@torch.no_grad()
def bound_terms(rows: DiffusedRows, draws: RowDraws, density: LevelDensity, num_levels: int) -> BoundTerms:
    """One unbiased estimate of the bound of each row, from `num_levels` calls of `predict`."""
    alpha, sigma = alpha_sigma_of(torch.tensor(rows.cleanest, dtype=torch.float64))
    u_blz = float(alpha) * rows.clean_blz + float(sigma) * draws.normal(num_levels, rows.clean_blz)
    levels = observe_levels(rows, draws, density, num_levels)
    return BoundTerms(
        prior_b=prior_divergence(rows.clean_blz, rows.target_bl, rows.noisiest),
        reconstruction_b=rows.reconstruct(u_blz).double(),
        denoising_b=(levels.integrand_kb / levels.density_kb).mean(dim=0),
    )


@dataclass(frozen=True)
class ObservedLevels:
    """The integrand of the denoising term where it was looked at: float64 [k, b].

    Attributes:
        log_snr_kb: lambda.
        density_kb: With which it was drawn.
        integrand_kb: e^(2 lambda) |u_0 - f(u_lambda)|^2, summed over each row's targets.
    """

    log_snr_kb: Tensor
    density_kb: Tensor
    integrand_kb: Tensor


@torch.no_grad()
def observe_levels(rows: DiffusedRows, draws: RowDraws, density: LevelDensity, num_levels: int) -> ObservedLevels:
    """Noise every row to `num_levels` levels, one after the other, and see how well it is denoised."""
    log_snr_kb, density_kb = density.draw(draws.strata(num_levels))
    integrand = []
    for index, log_snr_b in enumerate(log_snr_kb):
        alpha_b11, sigma_b11 = (value.float()[:, None, None] for value in alpha_sigma_of(log_snr_b))
        u_blz = alpha_b11 * rows.clean_blz + sigma_b11 * draws.normal(index, rows.clean_blz)
        error_bl = (rows.clean_blz - rows.predict(u_blz, log_snr_b)).double().square().sum(dim=-1)
        # Not a product with the mask: what is predicted beside the targets may be anything.
        integrand.append((2 * log_snr_b).exp() * torch.where(rows.target_bl, error_bl, 0.0).sum(dim=-1))
    return ObservedLevels(log_snr_kb, density_kb, torch.stack(integrand))


def prior_divergence(clean_blz: Tensor, target_bl: Tensor, noisiest: float) -> Tensor:
    """KL(N(alpha u_0, sigma^2 I) || N(0, I)) of each row's targets, float64 [b]."""
    alpha, sigma = alpha_sigma_of(torch.tensor(noisiest, dtype=torch.float64))
    mean_blz = float(alpha) * clean_blz.double()
    variance = float(sigma**2)
    divergence_bl = (mean_blz.square() + variance - 1.0 - float(2 * sigma.log())).sum(dim=-1) / 2
    return torch.where(target_bl, divergence_bl, 0.0).sum(dim=-1)
