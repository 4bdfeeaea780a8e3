"""Sampling fills targets and nothing else, and a sample does not know its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.rounding import NOT_TARGETS, nearest_tokens
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.diffusion.solvers import SOLVERS, time_grid
from mdseq.generate.sampler import SamplerOptions, sample
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from mdseq.spec import load_spec

VOCAB, ROWS, LENGTH, T = 24, 8, 20, 40
SCHEDULE = NoiseSchedule(T)
M = torch.linspace(-1, 1, 8)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """Random weights."""
    overrides = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=8",
    ]  # fmt: skip
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig.of(load_spec(None, overrides).spec, VOCAB)).eval()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and lengths: sources of 1 to 8 tokens, then targets up to lengths of 13 to 20."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    tokens[:, 0] = SpecialToken.BOS
    length_b = 13 + torch.arange(ROWS)
    position = torch.arange(LENGTH)
    target = (position > torch.arange(ROWS)[:, None]) & (position < length_b[:, None])
    return tokens, target, length_b


def generate(denoiser: Denoiser, index: list[int], row_length: int = LENGTH, **options) -> Tensor:
    """Sample some of the rows as one batch."""
    tokens, target, length_b = (x[index] for x in rows())
    pad = row_length - LENGTH
    return sample(
        denoiser,
        M,
        SCHEDULE,
        torch.nn.functional.pad(tokens, (0, pad)),
        torch.nn.functional.pad(target, (0, pad)),
        Documents.whole(length_b, row_length),
        torch.tensor(index),
        replace(SamplerOptions(num_steps=6), **options),
    )


every_solver = pytest.mark.parametrize("solver", SOLVERS)
ALL = list(range(ROWS))


def test_the_source_is_marked_global_as_in_training(denoiser: Denoiser) -> None:
    """The first tokens of each source, as many as the model was made for; here the sources have 1 to 8 tokens."""
    marking = Denoiser(replace(denoiser.config, num_source_global=3)).eval()
    marking.load_state_dict(denoiser.state_dict())
    seen = []
    hook = marking.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    marked = generate(marking, ALL)
    hook.remove()
    for documents in seen:
        assert documents.global_bl.sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
        assert documents.global_bl[:, :3].sum() == documents.global_bl.sum()
    assert len({id(documents) for documents in seen}) == 1  # its layout is made once
    assert not torch.equal(marked, generate(denoiser, ALL))


@every_solver
@pytest.mark.parametrize("clamp", [False, True])
def test_only_targets_change_and_only_into_words_or_the_end(denoiser: Denoiser, solver: str, clamp: bool) -> None:
    tokens, target, _ = rows()
    generated = generate(denoiser, ALL, solver=solver, clamp=clamp)
    assert torch.equal(generated[~target], tokens[~target])
    assert not torch.isin(generated[target], torch.tensor(NOT_TARGETS)).any()
    assert len(generated[target].unique()) > 2


def test_what_stands_at_target_positions_is_ignored(denoiser: Denoiser) -> None:
    tokens, target, length_b = rows()
    outputs = [
        sample(
            denoiser, M, SCHEDULE, torch.where(target, filler, tokens), target, Documents.whole(length_b, LENGTH),
            torch.arange(ROWS), SamplerOptions(num_steps=4),
        )
        for filler in (SpecialToken.PAD, 9)
    ]  # fmt: skip
    assert torch.equal(*outputs)


@every_solver
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_sample_does_not_depend_on_its_batch(denoiser: Denoiser, solver: str, batch_size: int) -> None:
    whole = generate(denoiser, ALL, solver=solver)
    for first in range(0, ROWS, batch_size):
        index = ALL[first : first + batch_size]
        assert torch.equal(generate(denoiser, index, solver=solver), whole[index])


def test_nor_on_the_padding_of_its_row(denoiser: Denoiser) -> None:
    _, target, _ = rows()
    longer = generate(denoiser, ALL, row_length=50)[:, :LENGTH]
    assert torch.equal(longer[target], generate(denoiser, ALL)[target])


@every_solver
def test_the_seed_and_the_sample_id_decide(denoiser: Denoiser, solver: str) -> None:
    first = generate(denoiser, ALL, solver=solver, seed=1)
    assert torch.equal(first, generate(denoiser, ALL, solver=solver, seed=1))
    assert not torch.equal(first, generate(denoiser, ALL, solver=solver, seed=2))

    tokens, target, length_b = (x[[3]] for x in rows())
    of_id = [
        sample(
            denoiser, M, SCHEDULE, tokens, target, Documents.whole(length_b, LENGTH), torch.tensor([i]),
            SamplerOptions(num_steps=6, solver=solver, seed=1),
        )
        for i in (3, 4)
    ]  # fmt: skip
    assert torch.equal(of_id[0][0], first[3])
    assert not torch.equal(of_id[1][0], first[3])


def test_the_denoiser_sees_clean_sources_and_shifted_targets(denoiser: Denoiser) -> None:
    """z = Emb(w) at time 0 on the source; z = u + m at the time of the step on the target."""
    tokens, target, _ = rows()
    seen = []
    hook = denoiser.register_forward_pre_hook(lambda _, args: seen.append(args))
    generate(denoiser, ALL, num_steps=5, seed=7)
    hook.remove()
    for (z, time, _), t in zip(seen, time_grid(T, 5), strict=True):
        assert torch.equal(z[~target], denoiser.embedding(tokens)[~target])
        assert (time[~target] == 0).all()
        torch.testing.assert_close(time[target], torch.full_like(time[target], t * 1000 / T))
    start = NoiseKey(7, 0, torch.arange(ROWS)).normal(Purpose.STARTING, LENGTH, 8)
    torch.testing.assert_close(seen[0][0][target], (start + M)[target])


def estimates_of(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, clamp: bool) -> tuple[list[Tensor], Tensor]:
    """What the solver is told at each step, as embeddings, and the tokens of the sample."""
    told: list[Tensor] = []

    def spy(predict: Callable[[Tensor, int], Tensor], u: Tensor, *arguments) -> Tensor:
        def remembered(u: Tensor, t: int) -> Tensor:
            told.append(predict(u, t) + M)
            return told[-1] - M

        return SOLVERS["dpm"](remembered, u, *arguments)

    monkeypatch.setitem(SOLVERS, "spy", spy)
    generated = generate(denoiser, ALL, solver="spy", clamp=clamp)
    return told, generated


def test_clamping_replaces_each_estimate_by_an_embedding(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    words = denoiser.embedding.weight.detach()

    def distances(estimate: Tensor) -> Tensor:
        return (estimate.flatten(0, 1)[:, None] - words).norm(dim=-1).amin(dim=1)

    assert all((distances(x) < 1e-3).all() for x in estimates_of(denoiser, monkeypatch, clamp=True)[0])
    assert all((distances(x) > 1e-3).any() for x in estimates_of(denoiser, monkeypatch, clamp=False)[0])


def test_the_solver_works_on_the_shifted_process(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told f - m of the denoiser's f, and its result plus m is rounded to tokens."""
    predicted = []
    hook = denoiser.register_forward_hook(lambda _, __, out: predicted.append(out))
    told, generated = estimates_of(denoiser, monkeypatch, clamp=False)
    hook.remove()
    torch.testing.assert_close(told, predicted)
    _, target, _ = rows()
    assert torch.equal(generated[target], nearest_tokens(told[-1], denoiser.embedding.weight)[target])


def test_rounding_finds_the_nearest_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    words, x = torch.randn(50, 6, generator=generator), torch.randn(3, 9, 6, generator=generator)
    distance = torch.cdist(x.flatten(0, 1), words)
    distance[:, NOT_TARGETS] = torch.inf
    assert torch.equal(nearest_tokens(x, words).flatten(), distance.argmin(dim=1))
    allowed = [token for token in range(50) if token not in NOT_TARGETS]
    assert nearest_tokens(words[None], words)[0, allowed].tolist() == allowed


def test_the_end_of_the_text_may_be_generated_and_the_other_special_tokens_not() -> None:
    assert set(SpecialToken) - set(NOT_TARGETS) == {SpecialToken.EOS}
