"""Sampling fills targets and nothing else, and a sample does not know its batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import READINGS, Reading
from mdseq.diffusion.rounding import NOT_TARGETS, likeliest_tokens
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid
from mdseq.generate.sampler import MASK_PREDICT, SOLVERS, Estimate, SamplerOptions, sample
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from tests.generate.sampling import (
    ALL,
    DIM,
    LENGTH,
    ROWS,
    VOCAB,
    WITHOUT_TARGET,
    M,
    Settling,
    Shown,
    T,
    every_reading,
    every_solver,
    generate,
    model_of,
    some_rows,
)
from tests.sparse.layouts import pack


@every_solver
@every_reading
@pytest.mark.parametrize("clamp", [False, True])
def test_only_targets_change_and_only_into_words_or_the_end(
    model: DiffusionModel, solver: str, reading: Reading, clamp: bool
) -> None:
    tokens_bl, target_bl, _ = some_rows()
    generated_bl = generate(replace(model, reading=reading), solver=solver, clamp=clamp).tokens_bl
    assert torch.equal(generated_bl[~target_bl], tokens_bl[~target_bl])
    assert not torch.isin(generated_bl[target_bl], torch.tensor(NOT_TARGETS)).any()
    assert len(generated_bl[target_bl].unique()) > 2


def test_the_end_of_the_text_may_be_generated_and_the_other_special_tokens_not() -> None:
    assert set(SpecialToken) - set(NOT_TARGETS) == {SpecialToken.EOS}


MASKED = model_of("diffusion.self_conditioning=0")


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(0, 9),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0, 1]),
    st.sampled_from(READINGS),
)
def test_given_tokens_stay_whatever_the_mask(
    mask: list[list[bool]], length: int, num_calls: int, patience: int, reading: Reading
) -> None:
    """Nothing given, everything given, gaps, padding."""
    tokens_bl = torch.randint(5, VOCAB, (len(mask), 9), generator=torch.Generator().manual_seed(length))
    documents = Documents.whole(torch.full((len(mask),), length), 9)
    target_bl = torch.tensor(mask) & documents.real_bl
    options = SamplerOptions(num_calls=num_calls, patience=patience)
    model = replace(MASKED, reading=reading)
    samples = sample(model, tokens_bl, target_bl, documents, torch.arange(len(mask)), options)
    assert torch.equal(samples.tokens_bl[~target_bl], tokens_bl[~target_bl])
    assert (samples.tokens_bl >= 0).all()
    assert torch.equal(samples.calls_b > 0, target_bl.any(dim=1))


def test_what_stands_at_target_positions_is_ignored(model: DiffusionModel) -> None:
    """Even if it is what the first call estimates, which a row does not settle on by that."""
    tokens_bl, target_bl, length_b = some_rows()
    seen: list[Estimate] = []
    generate(model, observe=seen.append)
    fillers = [torch.full_like(tokens_bl, SpecialToken.PAD), torch.full_like(tokens_bl, 9), seen[0].tokens_bl]
    outputs = [
        sample(
            model, torch.where(target_bl, filler_bl, tokens_bl), target_bl, Documents.whole(length_b, LENGTH),
            torch.arange(ROWS), SamplerOptions(num_calls=6, patience=1),
        )
        for filler_bl in fillers
    ]  # fmt: skip
    for output in outputs[1:]:
        assert torch.equal(output.tokens_bl, outputs[0].tokens_bl)
        assert torch.equal(output.calls_b, outputs[0].calls_b)


@every_solver
@pytest.mark.parametrize(("patience", "reading"), [(0, "output"), (1, "output"), (1, "posterior")])
def test_a_sample_does_not_depend_on_its_batch(
    self_conditioned: DiffusionModel, solver: str, patience: int, reading: Reading
) -> None:
    model = replace(self_conditioned, reading=reading)
    options = {
        "solver": solver,
        "patience": patience,
        "guidance": 1.5,
        "absorb": solver != MASK_PREDICT,
        "time_grid": "quadratic",
    }
    whole = generate(model, **options)
    for batch_size in (1, 3, 8):
        for first in range(0, ROWS, batch_size):
            index = ALL[first : first + batch_size]
            part = generate(model, index, **options)
            assert torch.equal(part.tokens_bl, whole.tokens_bl[index])
            assert torch.equal(part.calls_b, whole.calls_b[index])


def test_nor_on_the_padding_of_its_row(model: DiffusionModel) -> None:
    _, target_bl, _ = some_rows()
    longer_bl = generate(model, row_length=50).tokens_bl[:, :LENGTH]
    assert torch.equal(longer_bl[target_bl], generate(model).tokens_bl[target_bl])


@every_solver
def test_the_seed_and_the_sample_id_decide(model: DiffusionModel, solver: str) -> None:
    first_bl = generate(model, solver=solver, seed=1).tokens_bl
    assert torch.equal(first_bl, generate(model, solver=solver, seed=1).tokens_bl)
    assert not torch.equal(first_bl, generate(model, solver=solver, seed=2).tokens_bl)

    tokens_bl, target_bl, length_b = (x[[3]] for x in some_rows())
    of_id = [
        sample(
            model, tokens_bl, target_bl, Documents.whole(length_b, LENGTH), torch.tensor([i]),
            SamplerOptions(num_calls=6, solver=solver, seed=1),
        ).tokens_bl
        for i in (3, 4)
    ]  # fmt: skip
    assert torch.equal(of_id[0][0], first_bl[3])
    assert not torch.equal(of_id[1][0], first_bl[3])


@pytest.mark.parametrize(
    ("solver", "grid", "num_calls"),
    [
        *((solver, "uniform", num_calls) for solver in SOLVERS for num_calls in (1, 2, 5)),
        *(("dpm_2m", grid, num_calls) for grid in TIME_GRIDS for num_calls in (6, T + 3)),
    ],
)
def test_as_many_calls_as_were_asked_for_from_noise_to_clean(
    model: DiffusionModel, solver: str, grid: str, num_calls: int
) -> None:
    """z = Emb(w) at time 0 on the source; z = u + m at the time of the call on the target; more calls than T too."""
    tokens_bl, target_bl, _ = (x[:2] for x in some_rows())
    with Shown(model) as shown:
        samples = generate(model, [0, 1], solver=solver, time_grid=grid, num_calls=num_calls, seed=7)
    assert samples.calls_b.tolist() == [num_calls, num_calls]
    expected = time_grid(grid, model.schedule, num_calls)
    assert (expected[0], expected[-1]) == (T - 1, 0 if num_calls > 1 else T - 1)
    for (z_blz, time_bl, _, _), t in zip(shown.calls, expected, strict=True):
        assert torch.equal(z_blz[~target_bl], model.denoiser.embed(tokens_bl)[~target_bl])
        assert (time_bl[~target_bl] == 0).all()
        torch.testing.assert_close(time_bl[target_bl], torch.full_like(time_bl[target_bl], t * 1000 / T))
    start_blz = NoiseKey(7, 0, torch.arange(2)).normal(Purpose.STARTING, LENGTH, DIM)
    start_blz = start_blz * (solver != MASK_PREDICT)  # which begins with m alone
    torch.testing.assert_close(shown.calls[0][0][target_bl], (start_blz + M)[target_bl])


def test_the_result_is_the_last_estimate(model: DiffusionModel) -> None:
    _, target_bl, _ = some_rows()
    with Shown(model) as shown:
        generated_bl = generate(model).tokens_bl
    last_bl = torch.zeros_like(generated_bl)
    called = [row for row in ALL if row != WITHOUT_TARGET]
    last_bl[called], _ = likeliest_tokens(shown.outputs[-1], model.denoiser.vocabulary())
    assert torch.equal(generated_bl[target_bl], last_bl[target_bl])


def test_rows_without_targets_are_not_denoised(model: DiffusionModel) -> None:
    with Shown(model) as shown:
        generate(model)
        assert [len(call[0]) for call in shown.calls] == [ROWS - 1] * 6
        generate(model, [WITHOUT_TARGET])
        assert len(shown.calls) == 6
    # The layout of the attention is made once for all calls.
    assert len({id(documents) for _, _, documents, _ in shown.calls}) == 1


def test_sources_are_marked_global_for_models_made_so(model: DiffusionModel) -> None:
    """The first tokens of each source, as many as the model was made for; here the sources have 1 to 8 tokens."""
    marking = Settling(replace(model.denoiser.config, num_source_global=3)).eval()
    marking.load_state_dict(model.denoiser.state_dict())
    marked = replace(model, denoiser=marking)
    rows = [0, 1, 2, 3, 4]
    with Shown(marked) as shown:
        generated_bl = generate(marked, rows).tokens_bl
    for _, _, documents, _ in shown.calls:
        assert documents.global_bl is not None
        assert documents.global_bl.sum(dim=1).tolist() == [1, 2, 3, 3, 3]
    assert not torch.equal(generated_bl, generate(model, rows).tokens_bl)


def test_documents_of_one_row_do_not_see_each_other(model: DiffusionModel) -> None:
    tokens_bl = torch.randint(5, VOCAB, (1, 18), generator=torch.Generator().manual_seed(0))
    documents = pack([[8, 10]], 18)
    target_bl = documents.position_bl >= 4
    other_bl = torch.where(documents.document_bl == 0, (tokens_bl - 4) % (VOCAB - 5) + 5, tokens_bl)
    options = SamplerOptions(num_calls=6, patience=0)
    one, other = (
        sample(model, tokens, target_bl, documents, torch.tensor([0]), options).tokens_bl
        for tokens in (tokens_bl, other_bl)
    )
    assert torch.equal(one[:, 8:], other[:, 8:])
    assert not torch.equal(one[:, 4:8], other[:, 4:8])


def test_each_call_is_observed(model: DiffusionModel) -> None:
    tokens_bl, target_bl, _ = some_rows()
    seen: list[Estimate] = []
    with Shown(model) as shown:
        samples = generate(model, observe=seen.append, time_grid="quadratic")
    assert [estimate.call for estimate in seen] == list(range(6))
    assert [estimate.timestep for estimate in seen] == time_grid("quadratic", model.schedule, 6)
    called = [row for row in ALL if row != WITHOUT_TARGET]
    vocabulary = model.denoiser.vocabulary()
    for estimate, output_blz in zip(seen, shown.outputs, strict=True):
        assert torch.equal(estimate.tokens_bl[~target_bl], tokens_bl[~target_bl])
        assert (estimate.confidence_bl[~target_bl] == 1).all()
        logits = output_blz @ vocabulary.embedding_vz.T + vocabulary.bias_v
        logits[..., NOT_TARGETS] = -math.inf
        confidence, token = logits.softmax(dim=-1).max(dim=-1)
        assert torch.equal(estimate.tokens_bl[called][target_bl[called]], token[target_bl[called]])
        torch.testing.assert_close(estimate.confidence_bl[called][target_bl[called]], confidence[target_bl[called]])
    assert torch.equal(seen[-1].tokens_bl, samples.tokens_bl)
