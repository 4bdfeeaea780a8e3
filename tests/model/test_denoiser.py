"""The denoiser keeps documents apart, ignores padding, and reaches as far as its layers allow."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.sparse import NO_DOCUMENT, Documents, Pattern
from mdseq.sparse.documents import leading_source
from mdseq.spec import load_spec

VOCAB = 40
EMBEDDING = 8
KINDS = {
    "sparse": ["attention.kind=sparse"],
    "full": ["attention.kind=full"],
    "sparse, post-norm": ["attention.kind=sparse", "model.norm=post"],
    "full, post-norm": ["attention.kind=full", "model.norm=post"],
    "sparse, experts": ["attention.kind=sparse", "experts.num_experts=4"],
    "full, experts, post-norm": ["attention.kind=full", "experts.num_experts=4", "model.norm=post"],
    "no globals, experts": ["attention.num_global=0", "experts.num_experts=4"],
    "groups of heads": ["attention.dilation=[[1, 3], 2]"],
    "hybrid": ["attention.full_every=2"],
    "self-conditioning": ["diffusion.self_conditioning=0.5"],
}
every_kind = pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS.keys())


def tiny_denoiser(*overrides: str) -> Denoiser:
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=3", "model.num_heads=2",
        "model.feedforward_dim=24", "attention.window=3", "attention.dilation=[1, 2]", "attention.num_global=2",
        "experts.num_experts=0", "experts.feedforward_dim=12", "experts.top_k=2",
        "diffusion.self_conditioning=0.0", "diffusion.normalise_embeddings=false",
    ]  # fmt: skip
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig.of(load_spec(None, [*tiny, *overrides]).spec, VOCAB)).eval()


def pack(rows: list[list[int]], row_length: int) -> Documents:
    """Rows of documents of the given lengths; a negative length is a stretch of padding."""
    document_bl = torch.full((len(rows), row_length), NO_DOCUMENT)
    position_bl = torch.zeros(len(rows), row_length, dtype=torch.long)
    for b, lengths in enumerate(rows):
        begin, document = 0, 0
        for length in lengths:
            end = begin + abs(length)
            if length > 0:
                document_bl[b, begin:end] = document
                position_bl[b, begin:end] = torch.arange(length)
                document += 1
            begin = end
    return Documents(document_bl, position_bl, max(1, int(document_bl.max()) + 1))


def random_inputs(documents: Documents, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy embeddings [b, l, z] and a time for every position [b, l]."""
    generator = torch.Generator().manual_seed(seed)
    shape = documents.document_bl.shape
    return torch.randn(*shape, EMBEDDING, generator=generator), 1000 * torch.rand(shape, generator=generator)


@every_kind
def test_shape_and_type(overrides: list[str]) -> None:
    documents = pack([[10, 4], [17]], 20)
    for dtype in (torch.float32, torch.bfloat16):
        out = tiny_denoiser(*overrides).to(dtype)(*random_inputs(documents), documents)
        assert (out.shape, out.dtype) == ((2, 20, EMBEDDING), torch.float32)
        assert torch.isfinite(out).all()


def test_tokens_are_scored_by_their_embeddings_and_a_bias() -> None:
    """The embedding learns from both its uses; a bias is all that is the scores' own."""
    denoiser = tiny_denoiser()
    vocabulary = denoiser.vocabulary()
    assert torch.equal(vocabulary.embedding_vz, denoiser.embedding.weight)
    assert torch.equal(vocabulary.bias_v, torch.zeros(VOCAB))
    assert [name for name, p in denoiser.named_parameters() if VOCAB in p.shape] == ["embedding.weight", "head.bias"]
    token_gradient, score_gradient = 1.0, 2.0
    (token_gradient * denoiser.embed(torch.tensor([3])) + score_gradient * vocabulary.embedding_vz[3]).sum().backward()
    vocabulary.bias_v[3].backward()
    assert (denoiser.embedding.weight.grad[3] == 3.0).all()
    assert denoiser.head.bias.grad.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_vocabulary_are_fp32(dtype: torch.dtype) -> None:
    denoiser = tiny_denoiser("diffusion.normalise_embeddings=true").to(dtype)
    vocabulary = denoiser.vocabulary()
    assert {denoiser.embed(torch.tensor([1])).dtype, vocabulary.embedding_vz.dtype, vocabulary.bias_v.dtype} == {
        torch.float32
    }


def test_normalised_embeddings_have_one_length_and_keep_their_direction() -> None:
    """sqrt(z): that of N(0, I), so that the noise is as strong as it is beside embeddings that are not normalised."""
    plain, normalised = tiny_denoiser(), tiny_denoiser("diffusion.normalise_embeddings=true")
    with torch.no_grad():
        for denoiser in (plain, normalised):
            denoiser.embedding.weight *= torch.linspace(0.1, 9, VOCAB)[:, None]  # as training might
    tokens = torch.tensor([[3, 0, VOCAB - 1]])
    e, e_normalised = plain.embed(tokens), normalised.embed(tokens)
    torch.testing.assert_close(e_normalised.norm(dim=-1), torch.full((1, 3), EMBEDDING**0.5))
    torch.testing.assert_close(torch.cosine_similarity(e, e_normalised, dim=-1), torch.ones(1, 3))
    assert e.norm(dim=-1).max() > 2 * e.norm(dim=-1).min()
    assert torch.equal(normalised.vocabulary().embedding_vz[tokens], e_normalised)


def test_an_estimate_is_seen_where_it_stands_and_none_is_zero() -> None:
    denoiser, documents = tiny_denoiser("diffusion.self_conditioning=0.5"), pack([[12, 9]], 21)
    inputs = (*random_inputs(documents), documents)
    estimate_blz = random_inputs(documents, seed=2)[0].requires_grad_()
    out = denoiser(*inputs, estimate_blz)
    assert torch.equal(denoiser(*inputs), denoiser(*inputs, torch.zeros_like(estimate_blz)))
    assert not torch.equal(out, denoiser(*inputs))
    (gradient_blz,) = torch.autograd.grad(out[:, :12].square().sum(), estimate_blz)
    assert (gradient_blz[:, :12] != 0).any(dim=-1).all()
    assert (gradient_blz[:, 12:] == 0).all(), "of its own document only"


def test_a_model_without_self_conditioning_has_no_use_for_an_estimate() -> None:
    denoiser, documents = tiny_denoiser(), pack([[12]], 12)
    inputs = (*random_inputs(documents), documents)
    assert torch.equal(denoiser(*inputs), denoiser(*inputs, torch.ones_like(inputs[0])))


def test_the_layers_take_their_dilations_in_turn() -> None:
    patterns = [block.attention.pattern for block in tiny_denoiser().blocks]
    assert patterns == [Pattern(3, (1,)), Pattern(3, (2,)), Pattern(3, (1,))]


def test_the_schedule_of_the_spec_is_that_of_the_layers() -> None:
    overrides = ["attention.dilation=[[1, 1], [2, 4]]", "attention.dilation_schedule=interpolate"]
    config = tiny_denoiser(*overrides, "model.num_layers=5", "attention.full_every=4").config
    grouped = [Pattern(3, dilations) for dilations in ((1, 1), (1, 1), (1, 2))]
    assert config.patterns == (*grouped, Pattern(None), Pattern(3, (2, 4)))
    assert tiny_denoiser("attention.kind=full", *overrides, "attention.num_source_global=3").config == (
        tiny_denoiser("attention.kind=full").config
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["attention.dilation=[[1, 2]]", "attention.full_every=2"],
        ["attention.kind=full"],
        ["diffusion.self_conditioning=0.5", "diffusion.normalise_embeddings=true"],
    ],
)
def test_config_survives_json(overrides: list[str]) -> None:
    config = tiny_denoiser(*overrides).config
    assert DenoiserConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@every_kind
def test_documents_do_not_leak(overrides: list[str]) -> None:
    """A change of one document changes no output of the others, and no gradient flows between them: exactly."""
    denoiser, documents = tiny_denoiser(*overrides), pack([[12, 9, 7], [15, 13]], 30)
    z_blz, time_bl = random_inputs(documents)
    out = denoiser(z_blz.requires_grad_(), time_bl.requires_grad_(), documents)
    for document in (0, 1):
        mine = documents.document_bl == document
        grad_z, grad_time = torch.autograd.grad(out[mine].square().sum(), (z_blz, time_bl), retain_graph=True)
        assert (grad_z[mine] != 0).any()
        assert (grad_z[~mine] == 0).all()
        assert (grad_time[~mine] == 0).all()

        other_z, other_time = random_inputs(documents, seed=2)
        changed = denoiser(
            torch.where(mine[..., None], other_z, z_blz), torch.where(mine, other_time, time_bl), documents
        )
        assert not torch.equal(changed[mine], out[mine])
        if not denoiser.config.num_experts:
            assert torch.equal(changed[~mine], out[~mine])
        else:  # an expert's matrix product may round differently with other rows beside
            torch.testing.assert_close(changed[~mine], out[~mine], rtol=1e-5, atol=1e-5)


@every_kind
def test_padding_changes_nothing(overrides: list[str]) -> None:
    denoiser, documents = tiny_denoiser(*overrides), pack([[12, -3, 7], [5], []], 30)
    z_blz, time_bl = random_inputs(documents)
    real = documents.real_bl
    out = denoiser(z_blz.requires_grad_(), time_bl, documents)
    (gradient,) = torch.autograd.grad(out[real].square().sum(), z_blz)
    assert (gradient[~real] == 0).all()
    changed = denoiser(torch.where(real[..., None], z_blz, 100.0), torch.where(real, time_bl, 7.0), documents)
    torch.testing.assert_close(changed[real], out[real], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(changed).all()


@every_kind
def test_a_document_is_denoised_the_same_alone_or_in_company(overrides: list[str]) -> None:
    """Positions count within documents, so neither the offset in the row nor the neighbours matter."""
    denoiser, length = tiny_denoiser(*overrides), 23
    alone = pack([[length]], length)
    z_blz, time_bl = random_inputs(alone)
    expected = denoiser(z_blz, time_bl, alone)[0]
    for row in ([length, 9], [1, length], [7, length, 5], [-4, 11, length]):
        packed = pack([row, [50]], 60)
        begin = sum(abs(other) for other in row[: row.index(length)])
        z, time = random_inputs(packed, seed=3)
        z[0, begin : begin + length], time[0, begin : begin + length] = z_blz[0], time_bl[0]
        out = denoiser(z, time, packed)[0, begin : begin + length]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_position_within_the_document_matters() -> None:
    """Two documents of the same noisy embeddings, in another order, are not denoised alike."""
    denoiser, documents = tiny_denoiser("attention.kind=full"), pack([[12]], 12)
    z_blz, time_bl = random_inputs(documents)
    out = denoiser(z_blz, torch.zeros_like(time_bl), documents)
    reversed_out = denoiser(z_blz.flip(1), torch.zeros_like(time_bl), documents).flip(1)
    assert (out - reversed_out).abs().max() > 1e-3


def test_the_noise_level_matters() -> None:
    denoiser, documents = tiny_denoiser(), pack([[12]], 12)
    z_blz, time_bl = random_inputs(documents)
    assert (denoiser(z_blz, time_bl, documents) - denoiser(z_blz, time_bl / 2, documents)).abs().max() > 1e-2


def reached(denoiser: Denoiser, length: int) -> list[int]:
    """Positions whose input bears on the output of position 0."""
    documents = pack([[length]], length)
    z_blz, time_bl = random_inputs(documents)
    out = denoiser(z_blz.requires_grad_(), time_bl, documents)
    (gradient,) = torch.autograd.grad(out[0, 0].square().sum(), z_blz)
    return (gradient[0] != 0).any(dim=-1).nonzero().flatten().tolist()


def test_windows_reach_the_sum_of_the_layers_and_globals_reach_everything() -> None:
    reach = 3 * 1 + 3 * 2 + 3 * 1  # window times dilation, layer by layer
    assert reached(tiny_denoiser("attention.num_global=0"), 40) == list(range(reach + 1))
    assert reached(tiny_denoiser("attention.num_global=0", "attention.full_every=3"), 40) == list(range(40))
    assert reached(tiny_denoiser("attention.num_global=1"), 40) == list(range(40))
    assert reached(tiny_denoiser("attention.kind=full"), 40) == list(range(40))


def test_one_layer_is_not_enough_for_a_global_token_to_pass_a_message_on() -> None:
    """A global token collects in one layer what tokens read in the next."""
    assert reached(tiny_denoiser("model.num_layers=1"), 20) == [0, 1, 2, 3]
    assert reached(tiny_denoiser("model.num_layers=2"), 20) == list(range(20))


def test_a_global_source_token_is_seen_at_once_by_its_whole_document() -> None:
    denoiser = tiny_denoiser("model.num_layers=1", "attention.num_global=0", "attention.num_source_global=2")
    target_bl = torch.arange(20)[None] >= 5
    documents = pack([[20]], 20)
    documents = documents.marked(leading_source(documents, target_bl, denoiser.config.num_source_global))
    z_blz, time_bl = random_inputs(documents)
    out = denoiser(z_blz.requires_grad_(), time_bl, documents)
    (gradient,) = torch.autograd.grad(out[0, 15].square().sum(), z_blz)
    assert (gradient[0] != 0).any(dim=-1).nonzero().flatten().tolist() == [0, 1, *range(12, 19)]


def test_engines_agree() -> None:
    documents = pack([[31, 20], [47]], 60)
    banded, reference = (tiny_denoiser(f"attention.engine={engine}") for engine in ("banded", "reference"))
    inputs = random_inputs(documents)
    real = documents.real_bl
    torch.testing.assert_close(
        banded(*inputs, documents)[real], reference(*inputs, documents)[real], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("embedding_dim", [7, 8])
def test_any_embedding_dimension_that_the_spec_allows_works(embedding_dim: int) -> None:
    denoiser, documents = tiny_denoiser(f"model.embedding_dim={embedding_dim}"), pack([[5]], 5)
    assert denoiser(torch.randn(1, 5, embedding_dim), torch.zeros(1, 5), documents).shape[-1] == embedding_dim
