"""The bound, where the likelihood is known: data whose best denoiser can be written down.

Shapes: b rows, l length, z embedding dimension, v vocabulary, k levels of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mdseq.diffusion.bound import DiffusedRows, LevelDensity, RowDraws, bound_terms, observe_levels, prior_divergence
from mdseq.diffusion.schedule import NoiseSchedule, alpha_sigma_of

SCHEDULE = NoiseSchedule("sqrt", 2000)
NOISIEST, CLEANEST = SCHEDULE.log_snr_t[-1].item(), SCHEDULE.log_snr_t[0].item()
EVEN = LevelDensity.even(NOISIEST, CLEANEST, 32)


def draws_of(num_rows: int, seed: int = 0, pass_index: int = 0) -> RowDraws:
    """Every row a document of its own."""
    rows = torch.arange(num_rows)
    return RowDraws(seed, pass_index, rows, rows, torch.zeros_like(rows))


def whole(clean_blz: Tensor, predict, reconstruct) -> DiffusedRows:
    """Rows of nothing but targets."""
    target_bl = torch.ones(clean_blz.shape[:2], dtype=torch.bool)
    return DiffusedRows(clean_blz, target_bl, predict, reconstruct, NOISIEST, CLEANEST)


def total(rows: DiffusedRows, draws: RowDraws, density: LevelDensity = EVEN, num_levels: int = 16) -> Tensor:
    """The bound of each row, [b]."""
    terms = bound_terms(rows, draws, density, num_levels)
    return terms.prior_b + terms.reconstruction_b + terms.denoising_b


def fitted_to(rows: DiffusedRows, num_rows: int) -> LevelDensity:
    """The density that a pass of its own shows to be good."""
    seen = observe_levels(rows, draws_of(num_rows, pass_index=1), EVEN, 32)
    return EVEN.fitted(seen.log_snr_kb.flatten(), seen.integrand_kb.flatten())


def levels(log_snr_b: Tensor) -> tuple[Tensor, Tensor]:
    alpha_b, sigma_b = alpha_sigma_of(log_snr_b)
    return alpha_b.float()[:, None, None], sigma_b.float()[:, None, None]


@dataclass(frozen=True)
class Gaussian:
    """Data of which every value is N(mean, deviation^2)."""

    mean: float
    deviation: float

    def posterior(self, u: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a value, given its noisy one."""
        variance = 1 / (self.deviation**-2 + (alpha / sigma) ** 2)
        return variance * (self.mean / self.deviation**2 + alpha * u / sigma**2), variance

    def rows(self, num_rows: int, length: int, dim: int, shrink: float = 1.0) -> DiffusedRows:
        generator = torch.Generator().manual_seed(1)
        clean_blz = self.mean + self.deviation * torch.randn(num_rows, length, dim, generator=generator)

        def predict(u_blz: Tensor, log_snr_b: Tensor) -> Tensor:
            return shrink * self.posterior(u_blz, *levels(log_snr_b))[0]

        def reconstruct(u_blz: Tensor) -> Tensor:
            mean, variance = self.posterior(u_blz, *levels(torch.full((num_rows,), CLEANEST)))
            return log_loss(clean_blz, mean, variance)

        return whole(clean_blz, predict, reconstruct)

    def log_loss(self, clean_blz: Tensor) -> Tensor:
        """The true one of each row, [b]."""
        return log_loss(clean_blz, torch.tensor(self.mean), torch.tensor(self.deviation**2))


def log_loss(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (((value - mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2).sum(dim=(1, 2))


@dataclass(frozen=True)
class Words:
    """Tokens that are drawn evenly and independently; the absorbing state lies `shift` away from zero."""

    embedding_vz: Tensor
    shift: float

    @classmethod
    def of(cls, vocab_size: int, dim: int, scale: float = 1.0, shift: float = 0.0) -> Words:
        return cls(scale * torch.randn(vocab_size, dim, generator=torch.Generator().manual_seed(2)), shift)

    @property
    def centred_vz(self) -> Tensor:
        return self.embedding_vz - self.shift

    def log_posterior(self, u_blz: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(v | u), [b, l, v]."""
        distance_blv = (u_blz[:, :, None] - alpha[..., None] * self.centred_vz).square().sum(dim=-1)
        return (-distance_blv / (2 * sigma**2)).log_softmax(dim=-1)

    def rows(self, num_rows: int, length: int, shrink: float = 1.0) -> DiffusedRows:
        generator = torch.Generator().manual_seed(3)
        tokens_bl = torch.randint(len(self.embedding_vz), (num_rows, length), generator=generator)

        def predict(u_blz: Tensor, log_snr_b: Tensor) -> Tensor:
            return shrink * self.log_posterior(u_blz, *levels(log_snr_b)).exp() @ self.centred_vz

        def reconstruct(u_blz: Tensor) -> Tensor:
            log_blv = self.log_posterior(u_blz, *levels(torch.full((num_rows,), CLEANEST)))
            return -log_blv.gather(2, tokens_bl[..., None]).sum(dim=(1, 2))

        return whole(self.centred_vz[tokens_bl], predict, reconstruct)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 0.5), (-2.0, 0.1)])
def test_the_bound_of_gaussian_data_is_their_entropy(mean: float, deviation: float) -> None:
    """Row by row the bound is a noisy view of the true log-density; on average it is the entropy."""
    data = Gaussian(mean, deviation)
    rows = data.rows(num_rows=256, length=4, dim=8)
    excess_b = (total(rows, draws_of(256)) - data.log_loss(rows.clean_blz)) / 32
    error = excess_b.std() / 256**0.5
    assert error < 0.03
    assert abs(excess_b.mean()) < 3 * error
    entropy = 0.5 * math.log(2 * math.pi * math.e * deviation**2)
    assert (data.log_loss(rows.clean_blz) / 32).mean() == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(
    "words", [Words.of(7, 4), Words.of(50, 16), Words.of(50, 16, scale=0.3), Words.of(50, 8, shift=1.5)]
)
def test_the_bound_of_uniform_words_is_the_logarithm_of_their_number(words: Words) -> None:
    rows = words.rows(num_rows=128, length=32)
    nats_b = total(rows, draws_of(128), fitted_to(rows, 128), num_levels=32) / 32
    error, truth = nats_b.std() / 128**0.5, math.log(len(words.embedding_vz))
    assert abs(nats_b.mean() - truth) < 3 * error
    assert nats_b.mean() == pytest.approx(truth, rel=0.01)


def test_where_words_overlap_the_reconstruction_pays() -> None:
    """Embeddings that are hardly apart at the cleanest level: the terms change places, their sum does not."""
    rows = Words.of(50, 16, scale=0.02).rows(num_rows=128, length=32)
    terms = bound_terms(rows, draws_of(128), EVEN, 32)
    reconstruction, denoising = terms.reconstruction_b.mean() / 32, terms.denoising_b.mean() / 32
    assert reconstruction > 1.0
    assert denoising + reconstruction == pytest.approx(math.log(50), rel=0.01)


def test_the_prior_term_is_a_divergence() -> None:
    """Against torch's, with much signal left, and of targets alone."""
    clean_blz = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    target_bl = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    alpha, sigma = alpha_sigma_of(torch.tensor(-0.3, dtype=torch.float64))
    noised = torch.distributions.Normal(alpha * clean_blz, sigma)
    divergence_bl = torch.distributions.kl_divergence(noised, torch.distributions.Normal(0.0, 1.0)).sum(dim=-1)
    expected_b = (divergence_bl * target_bl).sum(dim=1)
    assert torch.allclose(prior_divergence(clean_blz, target_bl, -0.3), expected_b.double(), rtol=1e-6)


def test_a_worse_denoiser_has_a_larger_bound() -> None:
    words = Words.of(50, 16)
    nats = [total(words.rows(64, 16, shrink), draws_of(64)).mean().item() for shrink in (1.0, 0.95, 0.8, 0.0)]
    assert nats == sorted(nats)
    assert nats[1] > 1.01 * nats[0]


def test_what_is_not_a_target_does_not_count() -> None:
    rows = Words.of(50, 16).rows(2, 8)
    target_bl = torch.arange(8) < torch.tensor([[8], [3]])

    def predict(u_blz: Tensor, log_snr_b: Tensor) -> Tensor:
        return torch.where(target_bl[..., None], rows.predict(u_blz, log_snr_b), torch.nan)

    masked = observe_levels(replace(rows, target_bl=target_bl, predict=predict), draws_of(2), EVEN, 4)
    seen = observe_levels(rows, draws_of(2), EVEN, 4)
    assert torch.equal(masked.integrand_kb[:, 0], seen.integrand_kb[:, 0])
    assert 0 < masked.integrand_kb[:, 1].sum() < seen.integrand_kb[:, 1].sum()


def test_the_spread_over_seeds_is_the_stated_error() -> None:
    """The standard error over rows, each a document, tells how far estimates with other noise lie apart.

    All rows are the same row here, so that noise is all in which they differ.
    """
    words = Words.of(50, 16)
    rows = words.rows(1, 8)
    same = replace(
        rows, clean_blz=rows.clean_blz.expand(100, -1, -1), target_bl=rows.target_bl.expand(100, -1),
        reconstruct=lambda u_blz: torch.zeros(len(u_blz)),
    )  # fmt: skip
    estimates = [total(same, draws_of(100, seed), num_levels=4) for seed in range(60)]
    means = torch.stack([nats_b.mean() for nats_b in estimates])
    stated = torch.stack([nats_b.std() / 10 for nats_b in estimates]).square().mean().sqrt()
    assert means.std().item() == pytest.approx(stated.item(), rel=0.3)  # 60 estimates tell a deviation to about 9 %


def test_rows_do_not_depend_on_their_company() -> None:
    words = Words.of(50, 16)
    rows, draws = words.rows(6, 8), draws_of(6)
    together = bound_terms(rows, draws, EVEN, 8)
    for b in range(6):
        alone = replace(
            rows, clean_blz=rows.clean_blz[b : b + 1], target_bl=rows.target_bl[b : b + 1],
            reconstruct=lambda u_blz: torch.zeros(1),
        )  # fmt: skip
        own = RowDraws(0, 0, draws.row_b[b : b + 1], draws.document_b[b : b + 1], draws.part_b[b : b + 1])
        terms = bound_terms(alone, own, EVEN, 8)
        assert torch.allclose(terms.denoising_b, together.denoising_b[b : b + 1], rtol=1e-5)
        assert torch.equal(terms.prior_b, together.prior_b[b : b + 1])


# The levels


def test_strata_are_even_and_differ_by_document_and_pass() -> None:
    draws = draws_of(4)
    points_kb = draws.strata(8)
    assert torch.allclose(points_kb.diff(dim=0), torch.full((7, 4), 1 / 8, dtype=torch.float64))
    assert ((points_kb > 0) & (points_kb < 1)).all()
    assert len(points_kb[0].unique()) == 4
    assert not torch.equal(points_kb, draws_of(4, pass_index=1).strata(8))
    assert not torch.equal(points_kb, draws_of(4, seed=1).strata(8))


def test_the_parts_of_a_document_fill_each_other_s_gaps() -> None:
    """Eight parts of one document, one level each: no two levels close together."""
    draws = RowDraws(0, 0, torch.arange(8), torch.zeros(8, dtype=torch.long), torch.arange(8))
    points = draws.strata(1).flatten().sort().values
    assert points.diff().min() > 0.05


def test_no_two_draws_of_noise_are_the_same() -> None:
    like_blz = torch.zeros(2, 3, 4)
    seen = [draws_of(2, seed, pass_index).normal(index, like_blz)
            for seed in (0, 1) for pass_index in (0, 1) for index in (0, 1)]  # fmt: skip
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 16


def test_levels_are_drawn_with_the_density_that_is_stated() -> None:
    """The integral of anything is the mean of it over the density; here of 1, lambda and lambda^2."""
    density = LevelDensity(-2.0, 3.0, torch.tensor([0.1, 0.6, 0.05, 0.25], dtype=torch.float64))
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_snr, at = density.draw(uniform)
    assert log_snr.min() >= -2.0
    assert log_snr.max() <= 3.0
    assert (log_snr.diff() > 0).all()
    for power, integral in ((0, 5.0), (1, 2.5), (2, 35 / 3)):
        assert (log_snr**power / at).mean() == pytest.approx(integral, rel=1e-3)


def test_ends_of_the_cumulative_distribution() -> None:
    density = LevelDensity(-2.0, 3.0, torch.full((3,), 1 / 3, dtype=torch.float64))
    log_snr, at = density.draw(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert log_snr.tolist() == pytest.approx([-2.0, 3.0])
    assert at.tolist() == pytest.approx([0.2, 0.2])


def test_a_fitted_density_follows_the_integrand_and_leaves_nothing_out() -> None:
    even = LevelDensity.even(0.0, 4.0, 4)
    log_snr = torch.tensor([0.5, 0.6, 1.5, 2.5, 4.0], dtype=torch.float64)
    fitted = even.fitted(log_snr, torch.tensor([3.0, 3.0, 0.0, 1.0, 0.0]))
    assert fitted.probability_i.tolist() == pytest.approx([0.7, 0.025, 0.25, 0.025])
    assert torch.equal(even.fitted(log_snr, torch.zeros(5)).probability_i, even.probability_i)


def test_a_fitted_density_changes_the_noise_of_the_estimate_and_not_its_mean() -> None:
    words = Words.of(50, 16)
    rows = words.rows(128, 16)
    truth = 16 * math.log(50)
    spread = []
    for density in (EVEN, fitted_to(rows, 128)):
        nats_b = total(rows, draws_of(128), density, num_levels=8)
        assert abs(nats_b.mean() - truth) < 3 * nats_b.std() / 128**0.5
        spread.append(nats_b.var().item())
    assert spread[1] < spread[0] / 2
