"""Readings of a denoiser's output against their definitions, position by position in float64.

Shapes: b rows, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mdseq.diffusion import rounding
from mdseq.diffusion.estimates import READINGS, Reader, Reading, evidence, with_square
from mdseq.diffusion.schedule import alpha_sigma_of
from mdseq.model.denoiser import Vocabulary


@dataclass(frozen=True)
class Case:
    """Two rows, of which some positions are targets, and some were replaced by m."""

    f_blz: Tensor
    z_blz: Tensor
    log_snr_bl: Tensor
    target_bl: Tensor
    replaced_bl: Tensor
    vocabulary: Vocabulary
    m_z: Tensor


def random_case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    m_z = normal(5)
    target_bl, replaced_bl = torch.rand(2, 2, 8, generator=generator) < torch.tensor([0.7, 0.3])[:, None, None]
    z_blz = torch.where(replaced_bl[..., None], m_z, normal(2, 8, 5))
    log_snr_bl = torch.rand(2, 8, generator=generator, dtype=torch.float64) * 4 - 2.5
    return Case(normal(2, 8, 5), z_blz, log_snr_bl, target_bl, replaced_bl, Vocabulary(normal(11, 5), normal(11)), m_z)


def log_density(case: Case, b: int, i: int) -> Tensor:
    """log N(z_t; alpha (e - m) + m, sigma^2) of every token's e, or nothing where z_t was replaced: [v]."""
    if case.replaced_bl[b, i]:
        return torch.zeros(len(case.vocabulary.bias_v), dtype=torch.float64)
    alpha, sigma = alpha_sigma_of(case.log_snr_bl[b, i])
    noisy = torch.distributions.Normal(alpha * (case.vocabulary.embedding_vz.double() - case.m_z) + case.m_z, sigma)
    return noisy.log_prob(case.z_blz[b, i].double()).sum(dim=-1)


def probabilities(case: Case, reading: Reading, b: int, i: int) -> Tensor:
    """By definition, float64 [v]."""
    embedding_vz, bias_v = case.vocabulary.embedding_vz.double(), case.vocabulary.bias_v.double()
    logits_v = embedding_vz @ case.f_blz[b, i].double() + bias_v
    if reading == "posterior":
        logits_v = logits_v.log_softmax(dim=0) + log_density(case, b, i)
    return logits_v.softmax(dim=0)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("seed", range(3))
def test_scores_give_the_probabilities_of_the_definition(seed: int, reading: Reading) -> None:
    case = random_case(seed)
    reader = Reader.of(reading, case.vocabulary, case.m_z)
    scores_bly = reader.scores(case.f_blz, case.z_blz, case.log_snr_bl)
    probability_blv = (scores_bly @ reader.scored.embedding_vz.T + reader.scored.bias_v).softmax(dim=-1)
    assert case.replaced_bl.any()
    for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(8)).tolist():
        expected_v = probabilities(case, reading, b, i)
        assert torch.allclose(probability_blv[b, i].double(), expected_v, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk_logits", [1, 40, 2**22])
@pytest.mark.parametrize("reading", READINGS)
def test_estimates_are_means_under_these_probabilities(
    monkeypatch: pytest.MonkeyPatch, reading: Reading, chunk_logits: int
) -> None:
    monkeypatch.setattr(rounding, "CHUNK_LOGITS", chunk_logits)
    case = random_case(3)
    reader = Reader.of(reading, case.vocabulary, case.m_z)
    clean_blz = reader.clean(case.f_blz, reader.scores(case.f_blz, case.z_blz, case.log_snr_bl), case.target_bl)
    if reading == "output":
        assert torch.equal(clean_blz, case.f_blz)
        return
    for b, i in case.target_bl.nonzero().tolist():
        expected_z = probabilities(case, reading, b, i) @ case.vocabulary.embedding_vz.double()
        assert torch.allclose(clean_blz[b, i].double(), expected_z, atol=1e-5)
    assert (clean_blz[~case.target_bl] == 0).all()


def test_evidence_is_bayes_rule() -> None:
    """For equally likely tokens: the softmax of the densities."""
    case = random_case(1)
    scores_bly = evidence(case.z_blz, case.log_snr_bl, case.m_z)
    log_probability_blv = (scores_bly @ with_square(case.vocabulary).embedding_vz.T).log_softmax(dim=-1)
    assert (~case.replaced_bl).any()
    for b, i in (~case.replaced_bl).nonzero().tolist():
        expected_v = log_density(case, b, i).log_softmax(dim=0)
        assert torch.allclose(log_probability_blv[b, i].double(), expected_v, atol=1e-4)


def test_a_position_replaced_by_m_is_read_by_its_output_alone() -> None:
    case = random_case(2)
    posterior = Reader.of("posterior", case.vocabulary, case.m_z)
    scores_bly = posterior.scores(case.f_blz, case.m_z.expand_as(case.z_blz), case.log_snr_bl)
    z = case.f_blz.shape[-1]
    assert torch.equal(scores_bly[..., :z], case.f_blz)
    assert (scores_bly[..., z:] == 0).all()


def test_scores_carry_gradients_and_estimates_only_where_they_are_the_output() -> None:
    case = random_case(0)
    for reading in READINGS:
        f_blz = case.f_blz.clone().requires_grad_()
        reader = Reader.of(reading, case.vocabulary, case.m_z)
        scores_bly = reader.scores(f_blz, case.z_blz, case.log_snr_bl)
        (gradient_blz,) = torch.autograd.grad(scores_bly.sum(), f_blz, retain_graph=True)
        assert (gradient_blz == 1).all()
        clean_blz = reader.clean(f_blz, scores_bly, case.target_bl)
        assert clean_blz.requires_grad == (reading == "output")


@pytest.mark.parametrize("reading", READINGS)
def test_nothing_to_estimate(reading: Reading) -> None:
    case = random_case(0)
    reader = Reader.of(reading, case.vocabulary, case.m_z)
    scores_bly = reader.scores(case.f_blz, case.z_blz, case.log_snr_bl)
    clean_blz = reader.clean(case.f_blz, scores_bly, torch.zeros_like(case.target_bl))
    assert clean_blz.shape == case.f_blz.shape
