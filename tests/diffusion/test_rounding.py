"""Chunks of logits give what all logits at once give, and only a chunk of them ever stands in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion import rounding
from mdseq.diffusion.rounding import NOT_TARGETS, cross_entropy, likeliest_tokens, mean_embedding, nearest_tokens
from mdseq.model.denoiser import Vocabulary

SMALLEST_VOCABULARY = max(SpecialToken) + 1
every_shape = given(
    num_positions=st.integers(0, 20),
    vocab_size=st.integers(SMALLEST_VOCABULARY, 40),
    dim=st.integers(1, 9),
    chunk_logits=st.sampled_from([1, 50, 200, 10_000]),
    seed=st.integers(0, 2**16),
)


def plain_cross_entropy(
    x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor
) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    logits_nv = x_nz @ vocabulary.embedding_vz.T + vocabulary.bias_v
    loss_n = F.cross_entropy(logits_nv, token_n, reduction="none")
    return (weight_n * loss_n).sum(), loss_n.detach()


def random_case(
    num_positions: int, vocab_size: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Vocabulary, Tensor, Tensor]:
    """Arguments of `cross_entropy`; about half of the weights are 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    token_n = torch.randint(vocab_size, (num_positions,), generator=generator)
    weight_n = torch.rand(num_positions, generator=generator, dtype=dtype)
    weight_n *= torch.rand(num_positions, generator=generator) < 0.5
    return normal(num_positions, dim), Vocabulary(normal(vocab_size, dim), normal(vocab_size)), token_n, weight_n


def gradients(loss: Tensor, x_nz: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, ...]:
    """Of 3 * loss: the scale stands for whatever is done with the loss."""
    return torch.autograd.grad(3 * loss, (x_nz, vocabulary.embedding_vz, vocabulary.bias_v))


@pytest.fixture(params=["zeros are left out", "zeros are computed"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, and as on a GPU."""
    if request.param == "zeros are computed":
        monkeypatch.setattr(rounding, "_counted", lambda weight_n: slice(None))


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy


@pytest.mark.usefixtures("_both_ways")
@every_shape
def test_cross_entropy_is_the_plain_one(
    num_positions: int, vocab_size: int, dim: int, chunk_logits: int, seed: int
) -> None:
    x_nz, vocabulary, _, weight_n = case = random_case(num_positions, vocab_size, dim, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "CHUNK_LOGITS", chunk_logits)
        loss, loss_n = cross_entropy(*case)
    expected, expected_n = plain_cross_entropy(*case)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss_n, expected_n * (weight_n != 0))
    assert not loss_n.requires_grad
    torch.testing.assert_close(gradients(loss, x_nz, vocabulary), gradients(expected, x_nz, vocabulary))


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_LOGITS", 14)
    x_nz, vocabulary, token_n, weight_n = random_case(5, 7, 3)
    torch.autograd.gradcheck(
        lambda x, embedding, bias: cross_entropy(x, Vocabulary(embedding, bias), token_n, weight_n)[0],
        (x_nz, vocabulary.embedding_vz, vocabulary.bias_v),
    )


@pytest.mark.usefixtures("_both_ways")
def test_what_stands_at_a_position_of_weight_0_does_not_matter() -> None:
    x_nz, vocabulary, token_n, weight_n = case = random_case(20, 7, 3)
    nothing_n = weight_n == 0
    assert 0 < nothing_n.sum() < 20
    garbage_nz = x_nz.detach().clone()
    garbage_nz[nothing_n] = torch.tensor([torch.nan, torch.inf, 1e300], dtype=torch.float64)
    garbage_nz.requires_grad_()
    loss, loss_n = cross_entropy(*case)
    same_loss, same_loss_n = cross_entropy(garbage_nz, vocabulary, token_n, weight_n)
    assert torch.equal(loss_n, same_loss_n)
    assert (loss_n[nothing_n] == 0).all()
    expected = gradients(loss, x_nz, vocabulary)
    assert all(map(torch.equal, gradients(same_loss, garbage_nz, vocabulary), expected))
    assert (expected[0][nothing_n] == 0).all()


@pytest.mark.usefixtures("_both_ways")
def test_a_batch_without_any_weight_has_no_loss_and_no_gradient() -> None:
    x_nz, vocabulary, token_n, weight_n = random_case(6, 7, 3)
    loss, loss_n = cross_entropy(x_nz, vocabulary, token_n, torch.zeros_like(weight_n))
    assert loss == 0
    assert torch.equal(loss_n, torch.zeros_like(loss_n))
    assert not any(gradient.any() for gradient in gradients(loss, x_nz, vocabulary))


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    """p(0) is 1 to the last bit, p(1) less than the smallest number of fp32."""
    vocabulary = Vocabulary(torch.tensor([[5e3], [-5e3], [-5e3]]), torch.zeros(3))
    x_nz = torch.ones(2, 1, requires_grad=True)
    loss, loss_n = cross_entropy(x_nz, vocabulary, torch.tensor([0, 1]), torch.ones(2))
    assert loss_n.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(loss, x_nz)[0].tolist() == [[0.0], [1e4]]


def test_two_calls_share_a_graph_and_the_graph_may_be_kept() -> None:
    """The loss has two cross-entropies over one vocabulary, and a gradient may be asked for more than once."""
    x_nz, vocabulary, token_n, weight_n = random_case(9, 7, 3)

    def both(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        first, _ = function(x_nz, vocabulary, token_n, weight_n)
        second, _ = function(2 * x_nz + 1, vocabulary, token_n, weight_n.flip(0))
        return first + 0.1 * second

    loss, expected = both(cross_entropy), gradients(both(plain_cross_entropy), x_nz, vocabulary)
    inputs = (x_nz, vocabulary.embedding_vz, vocabulary.bias_v)
    for keep in (True, False):
        torch.testing.assert_close(torch.autograd.grad(3 * loss, inputs, retain_graph=keep), expected)


@pytest.mark.parametrize("vocabulary_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_computed_in_fp32(vocabulary_dtype: torch.dtype) -> None:
    """Only gradients are rounded: all else is that of the same numbers held in fp32."""
    x_nz, vocabulary, token_n, weight_n = random_case(9, 7, 3, dtype=torch.float32)
    low = [x_nz.bfloat16(), *(x.to(vocabulary_dtype) for x in (vocabulary.embedding_vz, vocabulary.bias_v))]
    high = [x.float() for x in low]

    def outcome(x_nz: Tensor, *embedding_and_bias: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        vocabulary = Vocabulary(*embedding_and_bias)
        loss, loss_n = cross_entropy(x_nz, vocabulary, token_n, weight_n)
        return loss, loss_n, gradients(loss, x_nz, vocabulary)

    (loss, loss_n, found), (expected, expected_n, expected_grads) = outcome(*low), outcome(*high)
    assert torch.equal(loss, expected)
    assert torch.equal(loss_n, expected_n)
    assert [x.dtype for x in found] == [x.dtype for x in low]
    torch.testing.assert_close(found, tuple(g.to(x.dtype) for g, x in zip(expected_grads, low, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@every_shape
def test_the_likeliest_token_is_the_plain_one(
    num_positions: int, vocab_size: int, dim: int, chunk_logits: int, seed: int
) -> None:
    x_nz, vocabulary, _, _ = random_case(2 * num_positions, vocab_size, dim, seed)
    x_blz = x_nz.view(2, num_positions, dim)
    logits_blv = x_blz @ vocabulary.embedding_vz.T + vocabulary.bias_v
    logits_blv[..., NOT_TARGETS] = -torch.inf
    confidence_bl, token_bl = logits_blv.softmax(dim=-1).max(dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "CHUNK_LOGITS", chunk_logits)
        found_bl, certain_bl = likeliest_tokens(x_blz, vocabulary)
    assert torch.equal(found_bl, token_bl)
    torch.testing.assert_close(certain_bl, confidence_bl.detach().float())


@every_shape
def test_the_nearest_token_is_the_plain_one(
    num_positions: int, vocab_size: int, dim: int, chunk_logits: int, seed: int
) -> None:
    x_nz, vocabulary, _, _ = random_case(2 * num_positions, vocab_size, dim, seed)
    distance_nv = torch.cdist(x_nz, vocabulary.embedding_vz)
    distance_nv[:, NOT_TARGETS] = torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "CHUNK_LOGITS", chunk_logits)
        found_bl = nearest_tokens(x_nz.view(2, num_positions, dim), vocabulary.embedding_vz)
    assert torch.equal(found_bl, distance_nv.argmin(dim=1).view(2, num_positions))


def test_an_embedding_is_nearest_to_itself_unless_forbidden() -> None:
    _, vocabulary, _, _ = random_case(0, 50, 6)
    nearest_v = nearest_tokens(vocabulary.embedding_vz[None], vocabulary.embedding_vz)[0]
    for token in range(50):
        assert (nearest_v[token] == token) == (token not in NOT_TARGETS)
    assert nearest_tokens(vocabulary.embedding_vz[None], vocabulary.embedding_vz, forbidden=[])[0].tolist() == list(
        range(50)
    )


@pytest.mark.parametrize("forbidden", [[], NOT_TARGETS, [5, 6]])
def test_forbidden_tokens_are_never_chosen(forbidden: list[int]) -> None:
    """However likely they are, and whatever is allowed."""
    x_nz, vocabulary, _, _ = random_case(200, 9, 2)
    bias_v = vocabulary.bias_v.detach().clone()
    bias_v[forbidden] = 1e6
    vocabulary = Vocabulary(vocabulary.embedding_vz, bias_v)
    x_blz = x_nz.view(4, 50, 2)
    token_bl, confidence_bl = likeliest_tokens(x_blz, vocabulary, forbidden)
    allowed = set(range(9)) - set(forbidden)
    assert set(token_bl.unique().tolist()) <= allowed
    assert set(nearest_tokens(x_blz, vocabulary.embedding_vz, forbidden).unique().tolist()) <= allowed
    assert (confidence_bl >= 1 / len(allowed)).all()  # the probabilities of those allowed add up to 1
    assert torch.equal(bias_v[forbidden], torch.full((len(forbidden),), 1e6, dtype=torch.float64))


def test_of_equal_tokens_the_first_is_chosen() -> None:
    vocabulary = Vocabulary(torch.ones(8, 2), torch.zeros(8))
    token_bl, confidence_bl = likeliest_tokens(torch.ones(1, 3, 2), vocabulary)
    assert (
        token_bl.tolist()
        == nearest_tokens(torch.ones(1, 3, 2), vocabulary.embedding_vz).tolist()
        == [[SpecialToken.EOS] * 3]
    )
    assert confidence_bl.tolist() == [[1 / 4] * 3]


def test_the_end_of_the_text_may_be_generated_and_the_other_special_tokens_not() -> None:
    assert set(SpecialToken) - set(NOT_TARGETS) == {SpecialToken.EOS}


# ---------------------------------------------------------------------------------------------------------------------
# Means


@every_shape
def test_the_mean_embedding_is_the_plain_one(
    num_positions: int, vocab_size: int, dim: int, chunk_logits: int, seed: int
) -> None:
    """Of all tokens, even those that are never written; they are scored in another space than they are averaged in."""
    score_ny, scored, _, _ = random_case(num_positions, vocab_size, dim, seed)
    embedding_vz = torch.randn(vocab_size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected_nz = torch.zeros(num_positions, 3, dtype=torch.float64)
    for n in range(num_positions):
        weight_v = torch.exp(scored.embedding_vz @ score_ny[n] + scored.bias_v).detach()
        expected_nz[n] = (weight_v[:, None] * embedding_vz).sum(dim=0) / weight_v.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "CHUNK_LOGITS", chunk_logits)
        found_nz = mean_embedding(score_ny, scored, embedding_vz)
    torch.testing.assert_close(found_nz, expected_nz)
    assert not found_nz.requires_grad


def test_the_mean_of_certain_scores_is_an_embedding() -> None:
    """The largest and the smallest score are too far apart for exp."""
    scored, embedding_vz = Vocabulary(torch.tensor([[5e3], [-5e3], [0.0]]), torch.zeros(3)), torch.eye(3)
    assert torch.equal(mean_embedding(torch.tensor([[1.0], [-1.0]]), scored, embedding_vz), embedding_vz[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Memory and products


class Record(TorchDispatchMode):
    """What operations ran, and every piece of memory that they returned; none is freed, so that none counts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self._kept: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(function._schema.name.removeprefix("aten::"))
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._kept[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage()
        return result

    def sizes(self) -> list[int]:
        """In bytes, largest first."""
        return sorted((storage.nbytes() for storage in self._kept.values()), reverse=True)


CHUNK_BYTES = 16 * 256 * 4  # 16 positions, of 400 and 800, with the logits of 256 words in fp32


def memory_of_loss(function: Callable[..., tuple[Tensor, Tensor]], num_positions: int) -> list[int]:
    x_nz, vocabulary, token_n, weight_n = random_case(num_positions, 256, 4, dtype=torch.float32)
    with Record() as record:
        loss, _ = function(x_nz, vocabulary, token_n, weight_n + 1)
        gradients(loss, x_nz, vocabulary)
    return record.sizes()


def memory_of_tokens(function: Callable[..., Any], num_positions: int) -> list[int]:
    x_nz, vocabulary, _, _ = random_case(num_positions, 256, 4, dtype=torch.float32)
    with Record() as record:
        function(x_nz[None], vocabulary)
    return record.sizes()


@pytest.mark.parametrize("num_positions", [400, 800])
def test_one_chunk_of_logits_is_all_there_ever_is(num_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next largest tensors are as large as x or the embeddings: nothing else grows with the vocabulary."""
    monkeypatch.setattr(rounding, "CHUNK_LOGITS", CHUNK_BYTES // 4)
    for sizes in (
        memory_of_loss(cross_entropy, num_positions),
        memory_of_tokens(likeliest_tokens, num_positions),
        memory_of_tokens(lambda x_blz, words: nearest_tokens(x_blz, words.embedding_vz), num_positions),
        memory_of_tokens(lambda x_blz, words: mean_embedding(x_blz[0], words, words.embedding_vz), num_positions),
    ):
        assert sizes[0] == CHUNK_BYTES
        assert sizes[1] <= max(num_positions, 256) * 4 * 4
    assert memory_of_loss(plain_cross_entropy, num_positions)[:2] == [num_positions * 256 * 4] * 2


@pytest.mark.parametrize("wanted", ["x", "embedding", "bias", "nothing", "nothing, under no_grad"])
def test_gradients_cost_two_more_products_where_they_are_wanted(wanted: str) -> None:
    x_nz, vocabulary, token_n, weight_n = random_case(9, 7, 3)
    inputs = {"x": x_nz, "embedding": vocabulary.embedding_vz, "bias": vocabulary.bias_v}
    expected, _ = plain_cross_entropy(x_nz, vocabulary, token_n, weight_n)
    expected_grads = dict(zip(inputs, gradients(expected, x_nz, vocabulary), strict=True))
    under_no_grad = wanted.endswith("no_grad")
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted or under_no_grad)
    with Record() as record, torch.set_grad_enabled(not under_no_grad):
        loss, _ = cross_entropy(x_nz, vocabulary, token_n, weight_n)
    products = sum(record.operations.count(name) for name in ("mm", "addmm", "addmm_"))
    if wanted in inputs:
        torch.testing.assert_close(torch.autograd.grad(3 * loss, inputs[wanted])[0], expected_grads[wanted])
        assert products == 3
    else:
        assert not loss.requires_grad
        assert products == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_LOGITS", 50)
    x_nz, vocabulary, token_n, weight_n = random_case(20, 7, 3)
    there_nz, there_n, weight_there_n = (x.detach().cuda() for x in (x_nz, token_n, weight_n))
    there = Vocabulary(vocabulary.embedding_vz.detach().cuda(), vocabulary.bias_v.detach().cuda())
    for tensor in (there_nz, there.embedding_vz, there.bias_v):
        tensor.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, loss_n = cross_entropy(there_nz, there, there_n, weight_there_n)
        found = gradients(loss, there_nz, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_n = cross_entropy(x_nz, vocabulary, token_n, weight_n)
    torch.testing.assert_close((loss.cpu(), loss_n.cpu()), (expected, expected_n))
    torch.testing.assert_close(tuple(x.cpu() for x in found), gradients(expected, x_nz, vocabulary))
