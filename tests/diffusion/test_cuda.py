"""Scores over the vocabulary on a GPU, against the definition in float64, forward and backward.

In fp32, and with products in TF32, as a bf16 run has them.

Shapes: n positions, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mdseq.diffusion import rounding
from mdseq.diffusion.rounding import NOT_TARGETS, cross_entropy, likeliest_tokens, mean_embedding, nearest_tokens
from mdseq.model.denoiser import Vocabulary
from tests.diffusion.test_rounding import gradients, plain_cross_entropy, random_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Positions, words, dimensions, logits of a chunk: one chunk, whole chunks, a last one that is short, one row each.
SHAPES = [(1, 9, 1, 2**20), (256, 512, 64, 2**14), (333, 1000, 24, 2**16), (1000, 4097, 128, 2**20), (7, 60, 136, 1)]
every_shape = pytest.mark.parametrize(("num_positions", "vocab_size", "dim", "chunk_logits"), SHAPES)


@pytest.fixture(params=["fp32", "tf32"], autouse=True)
def rounding_error(request: pytest.FixtureRequest) -> Iterator[float]:
    """What products are rounded to; memory that is left unwritten shows."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    blocks = [torch.full((2**exponent,), torch.nan, device="cuda") for exponent in range(7, 24) for _ in range(4)]
    del blocks
    yield 2.0**-10 if request.param == "tf32" else 2.0**-22
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def chunked(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_LOGITS_ON_GPU", chunk_logits)


def case_on_gpu(num_positions: int, vocab_size: int, dim: int) -> tuple[Tensor, Vocabulary, Tensor, Tensor]:
    """Logits are of a trained model's size, about N(0, 9)."""
    x_nz, words, token_n, weight_n = random_case(num_positions, vocab_size, dim, dtype=torch.float32)
    x_nz, embedding_vz, bias_v = (
        (scale * x.detach()).cuda().requires_grad_()
        for x, scale in ((x_nz, 3 * dim**-0.5), (words.embedding_vz, 1.0), (words.bias_v, 1.0))
    )
    return x_nz, Vocabulary(embedding_vz, bias_v), token_n.cuda(), weight_n.cuda()


def exact(vocabulary: Vocabulary) -> Vocabulary:
    return Vocabulary(*(x.detach().double().requires_grad_() for x in (vocabulary.embedding_vz, vocabulary.bias_v)))


def assert_near(ours: Tensor, exactly: Tensor, allowed: float) -> None:
    """No number further off than so much of the largest."""
    assert ours.shape == exactly.shape
    error, largest = (ours - exactly).abs().max(), exactly.abs().max()
    assert error <= allowed * largest, f"{error / largest:.2e} > {allowed:.2e}"  # NaN is not below it


@every_shape
@pytest.mark.usefixtures("chunked")
def test_cross_entropy(num_positions: int, vocab_size: int, dim: int, rounding_error: float) -> None:
    x_nz, vocabulary, token_n, weight_n = case_on_gpu(num_positions, vocab_size, dim)
    weight_n = weight_n if num_positions > 1 else weight_n + 1
    garbage_nz = x_nz.detach().masked_fill(weight_n[:, None] == 0, torch.nan).requires_grad_()
    loss, loss_n = cross_entropy(garbage_nz, vocabulary, token_n, weight_n)
    found = gradients(loss, garbage_nz, vocabulary)

    exact_nz, words = x_nz.detach().double().requires_grad_(), exact(vocabulary)
    expected, expected_n = plain_cross_entropy(exact_nz, words, token_n, weight_n.double())
    assert_near(loss.detach(), expected.detach(), 8 * rounding_error)
    assert_near(loss_n, expected_n * (weight_n != 0), 8 * rounding_error)
    for ours, best in zip(found, gradients(expected, exact_nz, words), strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours, best, 16 * rounding_error)


@every_shape
@pytest.mark.usefixtures("chunked")
def test_tokens(num_positions: int, vocab_size: int, dim: int, rounding_error: float) -> None:
    """Those chosen are the best, or no worse than by the rounding of logits of this size; probabilities are theirs."""
    x_nz, vocabulary, _, _ = case_on_gpu(num_positions, vocab_size, dim)
    words = exact(vocabulary)
    logits_nv = x_nz.detach().double() @ words.embedding_vz.detach().T + words.bias_v.detach()
    logits_nv[:, NOT_TARGETS] = -torch.inf
    token_n, confidence_n = likeliest_tokens(x_nz, vocabulary)
    allowed = 16 * rounding_error * logits_nv.isfinite().double().mul(logits_nv.nan_to_num(neginf=0.0)).abs().max()
    chosen_n = logits_nv.gather(1, token_n[:, None])[:, 0]
    assert (chosen_n >= logits_nv.max(dim=1).values - allowed).all()
    torch.testing.assert_close(
        confidence_n.double(), (chosen_n - logits_nv.logsumexp(dim=1)).exp(), rtol=float(allowed), atol=0.0
    )

    distance_nv = torch.cdist(x_nz.detach().double(), words.embedding_vz.detach())
    distance_nv[:, NOT_TARGETS] = torch.inf
    nearest_n = nearest_tokens(x_nz, vocabulary.embedding_vz)
    chosen_n = distance_nv.gather(1, nearest_n[:, None])[:, 0]
    largest = words.embedding_vz.detach().square().sum(dim=1).max()
    assert (chosen_n**2 <= distance_nv.min(dim=1).values ** 2 + 16 * rounding_error * largest).all()


@every_shape
@pytest.mark.usefixtures("chunked")
def test_the_mean_embedding(num_positions: int, vocab_size: int, dim: int, rounding_error: float) -> None:
    x_nz, vocabulary, _, _ = case_on_gpu(num_positions, vocab_size, dim)
    words = exact(vocabulary)
    logits_nv = x_nz.detach().double() @ words.embedding_vz.T + words.bias_v
    mean_nz = mean_embedding(x_nz, vocabulary, vocabulary.embedding_vz)
    assert_near(mean_nz, logits_nv.softmax(dim=1).detach() @ words.embedding_vz.detach(), 16 * rounding_error)
