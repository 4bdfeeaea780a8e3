"""Readings of a denoiser's output against their definitions, token by token in float64.

Shapes: b rows, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdseq.diffusion.schedule import alpha_sigma_of
from mdseq.evaluate import estimates
from mdseq.evaluate.estimates import READINGS, CentredVocabulary, Reading, read_estimate
from mdseq.model.denoiser import Vocabulary


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Vocabulary, Tensor]:
    """f, z_t, lambda, targets, vocabulary and m, of three rows."""
    generator = torch.Generator().manual_seed(seed)
    f_blz, z_blz = torch.randn(2, 3, 7, 5, generator=generator)
    log_snr_b = torch.tensor([-3.0, 0.1, 1.4], dtype=torch.float64)
    target_bl = torch.rand(3, 7, generator=generator) < 0.6
    vocabulary = Vocabulary(torch.randn(11, 5, generator=generator), torch.randn(11, generator=generator))
    return f_blz, z_blz, log_snr_b, target_bl, vocabulary, torch.randn(5, generator=generator)


def by_definition(
    reading: Reading, f_z: Tensor, z_z: Tensor, log_snr: Tensor, words: Vocabulary, m_z: Tensor
) -> Tensor:
    """The estimate of e at one position."""
    if reading == "output":
        return f_z
    embedding_vz = words.embedding_vz.double()
    log_probability_v = (embedding_vz @ f_z + words.bias_v).log_softmax(dim=0)
    if reading == "posterior":
        alpha, sigma = alpha_sigma_of(log_snr)
        noisy = torch.distributions.Normal(alpha * (embedding_vz - m_z) + m_z, sigma)
        log_probability_v = log_probability_v + noisy.log_prob(z_z).sum(dim=-1)
    return (log_probability_v.softmax(dim=0)[:, None] * embedding_vz).sum(dim=0)


@pytest.mark.parametrize("chunk_logits", [1, 40, 2**24])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("seed", range(3))
def test_readings_are_what_they_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch, seed: int, reading: Reading, chunk_logits: int
) -> None:
    monkeypatch.setattr(estimates, "CHUNK_LOGITS", chunk_logits)
    f_blz, z_blz, log_snr_b, target_bl, words, m_z = random_case(seed)
    u_blz, centred = z_blz - m_z, CentredVocabulary.of(words, m_z)
    estimate_blz = read_estimate(reading, f_blz - m_z, u_blz, log_snr_b, target_bl, centred) + m_z
    for b, place in target_bl.nonzero().tolist():
        position = f_blz[b, place].double(), z_blz[b, place].double(), log_snr_b[b]
        expected_z = by_definition(reading, *position, words, m_z.double())
        assert torch.allclose(estimate_blz[b, place].double(), expected_z, atol=1e-5)


def test_nothing_to_estimate() -> None:
    f_blz, z_blz, log_snr_b, target_bl, words, m_z = random_case(0)
    nothing_bl = torch.zeros_like(target_bl)
    estimate_blz = read_estimate("posterior", f_blz, z_blz, log_snr_b, nothing_bl, CentredVocabulary.of(words, m_z))
    assert estimate_blz.shape == f_blz.shape


def test_evidence_is_bayes_rule() -> None:
    _, z_blz, log_snr_b, _, words, m_z = random_case(1)
    log_snr = log_snr_b[1]
    x_nz, scored = CentredVocabulary.of(words, m_z).evidence((z_blz - m_z).flatten(0, 1), log_snr.item())
    log_probability_nv = (x_nz @ scored.embedding_vz.T + scored.bias_v).log_softmax(dim=-1)
    alpha, sigma = alpha_sigma_of(log_snr)
    noisy = torch.distributions.Normal(alpha * (words.embedding_vz.double() - m_z) + m_z, sigma)
    expected_nv = noisy.log_prob(z_blz.flatten(0, 1).double()[:, None]).sum(dim=-1).log_softmax(dim=-1)
    assert torch.allclose(log_probability_nv.double(), expected_nv, atol=1e-4)
