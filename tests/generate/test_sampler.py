"""Sampling fills targets and nothing else, and a sample does not know its batch.

`slow_sample` writes one row's sampling out in embeddings (z, not u), with every reading of the denoiser's output and
every option, and all else is held to it.

Shapes: b rows, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import READINGS, Reading
from mdseq.diffusion.rounding import NOT_TARGETS, likeliest_tokens, nearest_tokens
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.diffusion.solvers import SOLVERS
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid
from mdseq.errors import UserError
from mdseq.generate.sampler import Estimate, SamplerOptions, Samples, sample, thresholded
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from mdseq.spec import load_spec
from tests.sparse.layouts import pack

VOCAB, ROWS, LENGTH, DIM, T = 24, 8, 20, 8, 40
M = torch.linspace(-1, 1, DIM)
SCHEDULE = NoiseSchedule("sqrt", T)
ALL = list(range(ROWS))
WITHOUT_TARGET = 5


class Settling(Denoiser):
    """A denoiser that makes up its mind, as trained ones do and random weights do not.

    The best estimate if tokens were independent, with the random network's output for their prior.
    """

    def forward(
        self, z_blz: Tensor, time_bl: Tensor, documents: Documents, estimate_blz: Tensor | None = None
    ) -> Tensor:
        prior_blz = super().forward(z_blz, time_bl, documents, estimate_blz)
        alpha_bl, sigma_bl = SCHEDULE.alpha_sigma((time_bl * T / 1000).clamp(max=T - 1))
        words_vz = self.embedding.weight - M
        logits_blv = (z_blz - M) @ words_vz.T - alpha_bl[..., None] * words_vz.square().sum(dim=1) / 2
        logits_blv = logits_blv * (alpha_bl / sigma_bl**2)[..., None] + 2 * prior_blz @ words_vz.T
        return logits_blv.softmax(dim=-1) @ self.embedding.weight


def model_of(*overrides: str) -> DiffusionModel:
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=8",
        "diffusion.normalise_embeddings=false",
    ]  # fmt: skip
    torch.manual_seed(0)
    denoiser = Settling(DenoiserConfig.of(load_spec(None, [*tiny, *overrides]).spec, VOCAB)).eval()
    with torch.no_grad():
        denoiser.embedding.weight.mul_(2)
        denoiser.output[-1].weight.mul_(100)  # nothing is learned, but something is said
        denoiser.head.bias.copy_(-denoiser.embedding.weight.square().sum(dim=1) / 2)  # the likeliest is the nearest
    return DiffusionModel(denoiser, M, SCHEDULE, gamma=0.5, reading="output")


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return model_of("diffusion.self_conditioning=0")


@pytest.fixture(scope="module")
def self_conditioned() -> DiffusionModel:
    return model_of("diffusion.self_conditioning=0.5")


def some_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and lengths: sources of 1 to 8 tokens, then targets up to lengths of 13 to 20; one has none."""
    generator = torch.Generator().manual_seed(0)
    tokens_bl = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    tokens_bl[:, 0] = SpecialToken.BOS
    length_b = 13 + torch.arange(ROWS)
    position_l = torch.arange(LENGTH)
    target_bl = (position_l > torch.arange(ROWS)[:, None]) & (position_l < length_b[:, None])
    target_bl[WITHOUT_TARGET] = False
    return tokens_bl, target_bl, length_b


def generate(
    model: DiffusionModel, index: Sequence[int] = ALL, row_length: int = LENGTH, observe=None, **options
) -> Samples:
    """Sample some of the rows as one batch."""
    tokens_bl, target_bl, length_b = (x[list(index)] for x in some_rows())
    pad = row_length - LENGTH
    return sample(
        model,
        torch.nn.functional.pad(tokens_bl, (0, pad)),
        torch.nn.functional.pad(target_bl, (0, pad)),
        Documents.whole(length_b, row_length),
        torch.tensor(index),
        SamplerOptions(**({"num_calls": 6} | options)),
        observe,
    )


class Shown:
    """Remembers what a denoiser is shown while it is open."""

    def __init__(self, model: DiffusionModel) -> None:
        self.calls: list[tuple[Tensor, Tensor, Documents, Tensor | None]] = []
        self.outputs: list[Tensor] = []
        self.hooks = [
            model.denoiser.register_forward_pre_hook(lambda _, args: self.calls.append(args)),
            model.denoiser.register_forward_hook(lambda _, __, out: self.outputs.append(out)),
        ]

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def slow_read(model: DiffusionModel, f_blz: Tensor, z_blz: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """An output by the definition of its reading: the estimate [b, l, z], and the logits of its tokens [b, l, v]."""
    words = model.denoiser.vocabulary()
    logits_blv = f_blz @ words.embedding_vz.T + words.bias_v
    if model.reading == "posterior":
        level = model.schedule.levels([t])[0]
        mean_vz = level.alpha * (words.embedding_vz - M).double() + M
        noisy = torch.distributions.Normal(mean_vz, level.sigma)
        absorbed_bl1 = (z_blz == M).all(dim=-1, keepdim=True)
        evidence_blv = noisy.log_prob(z_blz[..., None, :].double()).sum(dim=-1).masked_fill(absorbed_bl1, 0.0)
        logits_blv = logits_blv + evidence_blv
    mean_blz = logits_blv.softmax(dim=-1).float() @ words.embedding_vz
    return (f_blz if model.reading == "output" else mean_blz), logits_blv


@torch.no_grad()
def slow_sample(model: DiffusionModel, row: int, options: SamplerOptions) -> list[tuple[Tensor, Tensor]]:
    """A row's tokens and their probabilities at each call, by DDIM or DDPM as their papers have them, shifted by m."""
    tokens_bl, target_bl, length_b = (x[[row]] for x in some_rows())
    schedule, denoiser = model.schedule, model.denoiser
    words, bias_v = denoiser.vocabulary().embedding_vz, denoiser.vocabulary().bias_v
    source_bl1, documents = ~target_bl[..., None], Documents.whole(length_b, LENGTH)
    grid = time_grid(options.time_grid, schedule, options.num_calls)
    log_snr = schedule.log_snr(torch.tensor(grid, dtype=torch.float64)).tolist()
    alpha = [math.sqrt(1 / (1 + math.exp(-2 * x))) for x in log_snr]
    sigma = [math.sqrt(1 / (1 + math.exp(2 * x))) for x in log_snr]

    def key(step: int) -> NoiseKey:
        return NoiseKey(options.seed, step, torch.tensor([row]))

    z = M + options.temperature * key(0).normal(Purpose.STARTING, LENGTH, DIM)
    x, rounded = None, []
    for i, t in enumerate(grid):
        earlier = None if x is None or not denoiser.config.self_conditioning else x.masked_fill(source_bl1, 0.0)
        time_bl = torch.where(target_bl, t * 1000 / T, 0.0)
        f = denoiser(torch.where(source_bl1, denoiser.embed(tokens_bl), z), time_bl, documents, earlier)
        if options.guidance != 1:
            time_bl = torch.where(target_bl, t * 1000 / T, (T - 1) * 1000 / T)
            free = denoiser(torch.where(source_bl1, M, z), time_bl, documents, earlier)
            f = (1 - options.guidance) * free + options.guidance * f
        x, logits = slow_read(model, f, z, t)
        if options.threshold < 1:
            limit = np.quantile(x[target_bl].abs().numpy(), options.threshold, method="higher")
            largest = words.abs().max().item()
            x = x.clamp(-limit, limit) * (largest / limit) if limit > largest else x.clamp(-largest, largest)
        if options.clamp:
            x = words[nearest_tokens(x, words)]
        if model.reading == "output":  # what was cut or clamped is what is rounded
            logits = x @ words.T + bias_v
        logits[..., NOT_TARGETS] = -torch.inf
        confidence, token = logits.softmax(dim=-1).max(dim=-1)
        rounded.append((torch.where(target_bl, token, tokens_bl)[0], torch.where(target_bl, confidence, 1.0)[0]))
        if i + 1 == len(grid):
            return rounded
        if options.solver == "ddim":
            epsilon = (z - M - alpha[i] * (x - M)) / sigma[i]
            z = M + alpha[i + 1] * (x - M) + sigma[i + 1] * epsilon
        else:
            ratio = (alpha[i] / alpha[i + 1]) ** 2
            mean = alpha[i + 1] * (1 - ratio) / sigma[i] ** 2 * (x - M)
            mean = mean + ratio**0.5 * sigma[i + 1] ** 2 / sigma[i] ** 2 * (z - M)
            deviation = (1 - ratio) ** 0.5 * sigma[i + 1] / sigma[i]
            z = M + mean + deviation * options.temperature * key(i + 1).normal(Purpose.SAMPLING, LENGTH, DIM)
        if options.absorb and i + 2 < len(grid):
            absorbed = key(i + 1).uniform(Purpose.RESAMPLING, LENGTH) <= model.gamma * sigma[i + 1]
            z = torch.where(absorbed[..., None], M, z)
    raise AssertionError("the loop returns at the last call")


every_reading = pytest.mark.parametrize("reading", READINGS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
FEATURES = {
    "plain": {},
    "guided": {"guidance": 2.5},
    "unguided": {"guidance": 0.0},
    "clamped": {"clamp": True},
    "thresholded": {"threshold": 0.6},
    "absorbed": {"absorb": True},
    "cold": {"temperature": 0.5},
    "everything": {"guidance": 3.0, "clamp": True, "threshold": 0.6, "absorb": True, "temperature": 0.8},
}
every_feature = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)


@every_feature
@every_reading
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("conditioned", [False, True], ids=["alone", "self_conditioned"])
def test_a_batch_is_its_rows_sampled_slowly(
    model: DiffusionModel,
    self_conditioned: DiffusionModel,
    conditioned: bool,
    solver: str,
    reading: Reading,
    options: dict,
) -> None:
    """At every call, with every option, alone and together."""
    chosen = replace(self_conditioned if conditioned else model, reading=reading)
    options = options | {"solver": solver, "seed": 3}
    seen: list[Estimate] = []
    samples = generate(chosen, observe=seen.append, **options)
    assert samples.calls_b.tolist() == [6 if row != WITHOUT_TARGET else 0 for row in ALL]
    for row in (0, 3, 7):
        expected = slow_sample(chosen, row, SamplerOptions(num_calls=6, **options))
        for estimate, (tokens_l, confidence_l) in zip(seen, expected, strict=True):
            assert estimate.tokens_bl[row].tolist() == tokens_l.tolist()
            torch.testing.assert_close(estimate.confidence_bl[row], confidence_l.float(), rtol=1e-3, atol=1e-3)
        assert torch.equal(samples.tokens_bl[row], expected[-1][0])


@every_reading
@every_feature
def test_looking_changes_nothing(self_conditioned: DiffusionModel, reading: Reading, options: dict) -> None:
    chosen = replace(self_conditioned, reading=reading)
    watched = generate(chosen, observe=lambda _: None, **options)
    assert torch.equal(watched.tokens_bl, generate(chosen, **options).tokens_bl)


def test_every_reading_makes_a_difference(model: DiffusionModel) -> None:
    texts = [tuple(generate(replace(model, reading=reading)).tokens_bl.flatten().tolist()) for reading in READINGS]
    assert len(set(texts)) == len(READINGS)


@pytest.mark.parametrize("name", ["guidance", "clamp", "threshold", "absorb", "temperature"])
def test_every_option_makes_a_difference(model: DiffusionModel, name: str) -> None:
    options = {"guidance": 5.0, "threshold": 0.6, "absorb": True, "temperature": 0.5}
    options = {"clamp": True} if name == "clamp" else options
    without = {other: value for other, value in options.items() if other != name}
    assert not torch.equal(generate(model, **options).tokens_bl, generate(model, **without).tokens_bl)


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
    options = {"solver": solver, "patience": patience, "guidance": 1.5, "absorb": True, "time_grid": "quadratic"}
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


# Options one by one.


def test_guidance_costs_a_second_pass_that_knows_no_source(model: DiffusionModel) -> None:
    _, target_bl, _ = (x[:2] for x in some_rows())
    with Shown(model) as shown:
        assert generate(model, [0, 1], guidance=1.0).calls_b.tolist() == [6, 6]
        assert len(shown.calls) == 6
        assert generate(model, [0, 1], guidance=2.0).calls_b.tolist() == [6, 6]
        assert len(shown.calls) == 18
    for with_source, without in zip(shown.calls[6::2], shown.calls[7::2], strict=True):
        assert torch.equal(with_source[0][target_bl], without[0][target_bl])
        assert (without[0][~target_bl] == M).all()
        assert with_source[2] is without[2]  # one layout for both


def test_clamping_makes_embeddings_of_estimates(self_conditioned: DiffusionModel) -> None:
    """From the first on, as the next call is shown; without it, they begin in between."""
    words_vz = self_conditioned.denoiser.embedding.weight.detach()
    _, target_bl, _ = (x[:5] for x in some_rows())

    def distances(clamp: bool) -> list[Tensor]:
        with Shown(self_conditioned) as shown:
            generate(self_conditioned, range(5), clamp=clamp)
        estimates = [call[3] for call in shown.calls[1:]]
        return [(x_blz[target_bl][:, None] - words_vz).norm(dim=-1).amin(dim=1) for x_blz in estimates]

    assert all((distance == 0).all() for distance in distances(clamp=True))
    assert distances(clamp=False)[0].mean() > 0.5


@every_reading
def test_the_denoiser_is_handed_its_previous_estimate(self_conditioned: DiffusionModel, reading: Reading) -> None:
    """As its output was read, on targets; none in the first call."""
    model = replace(self_conditioned, reading=reading)
    _, target_bl, _ = (x[:5] for x in some_rows())
    with Shown(model) as shown:
        generate(model, range(5))
    assert shown.calls[0][3] is None
    for i, t in enumerate(time_grid("uniform", SCHEDULE, 6)[:-1]):
        estimate_blz = shown.calls[i + 1][3]
        assert estimate_blz is not None
        expected_blz, _ = slow_read(model, shown.outputs[i], shown.calls[i][0], t)
        torch.testing.assert_close(estimate_blz, expected_blz * target_bl[..., None], rtol=1e-4, atol=1e-4)


def test_a_model_without_self_conditioning_is_handed_nothing(model: DiffusionModel) -> None:
    with Shown(model) as shown:
        generate(model, range(5))
    assert all(call[3] is None for call in shown.calls)


@every_solver
def test_without_temperature_there_is_no_noise_to_draw(model: DiffusionModel, solver: str) -> None:
    """The first call sees m alone, and neither the seed nor the sample's id makes a difference."""
    rows = [2, 3, 4]
    with Shown(model) as shown:
        cold_bl = generate(model, rows, solver=solver, temperature=0.0).tokens_bl
    _, target_bl, _ = (x[rows] for x in some_rows())
    assert (shown.calls[0][0][target_bl] == M).all()
    assert torch.equal(cold_bl, generate(model, rows, solver=solver, temperature=0.0, seed=9).tokens_bl)


@pytest.mark.parametrize("solver", ["ddpm", "dpm_2m_sde"])
def test_temperature_scales_the_noise_of_every_step(
    model: DiffusionModel, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the start: as if all normal numbers were drawn so much smaller."""
    expected = generate(model, solver=solver, temperature=0.3).tokens_bl
    draw = NoiseKey.normal
    monkeypatch.setattr(NoiseKey, "normal", lambda key, *what: 0.3 * draw(key, *what))
    assert torch.equal(generate(model, solver=solver).tokens_bl, expected)


@every_solver
def test_absorbed_targets_are_m_at_their_steps_end(model: DiffusionModel, solver: str) -> None:
    """With probability gamma * sigma, by noise of its own; but not where the last step has ended."""
    rows = [0, 1, 2]
    _, target_bl, _ = (x[rows] for x in some_rows())
    with Shown(model) as shown:
        generate(model, rows, solver=solver, absorb=True, seed=11)
    levels = model.schedule.levels(time_grid("uniform", model.schedule, 6))
    inside_a_step = {"dpm_2s": [1, 3], "dpm_3m": [1]}.get(solver, [])
    for i, (level, (z_blz, _, _, _)) in enumerate(zip(levels, shown.calls, strict=True)):
        is_m_bl = (z_blz == M).all(dim=-1) & target_bl
        uniform_bl = NoiseKey(11, i, torch.tensor(rows)).uniform(Purpose.RESAMPLING, LENGTH)
        expected_bl = (uniform_bl <= model.gamma * level.sigma) & target_bl
        if i in (0, 5, *inside_a_step):
            expected_bl = torch.zeros_like(expected_bl)
        assert torch.equal(is_m_bl, expected_bl)


def test_nothing_is_absorbed_without_an_absorbing_state(model: DiffusionModel) -> None:
    plain = replace(model, gamma=0.0)
    assert torch.equal(generate(plain, absorb=True).tokens_bl, generate(plain).tokens_bl)


@given(st.integers(1, 30), st.floats(0.01, 0.999), st.floats(0.1, 30), st.integers(0, 5))
def test_thresholding_is_by_the_quantile_of_each_rows_targets(
    num_targets: int, quantile: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_blz = scale * torch.randn(2, 30, 3, generator=generator)
    target_bl = torch.zeros(2, 30, dtype=torch.bool)
    target_bl[0, :num_targets] = target_bl[1, -1:] = True
    got_blz = thresholded(x_blz, target_bl, quantile, torch.tensor(2.0))
    for b in range(2):
        x, got = x_blz[b][target_bl[b]].numpy(), got_blz[b][target_bl[b]].numpy()
        limit = max(np.quantile(np.abs(x), quantile, method="higher"), 2.0)
        np.testing.assert_allclose(got, np.clip(x, -limit, limit) / limit * 2.0, rtol=1e-6)
        assert np.abs(got).max() <= 2.0 * (1 + 1e-6)


# Early exit.


@every_solver
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_row_is_done_when_its_tokens_have_not_changed(
    self_conditioned: DiffusionModel, solver: str, patience: int
) -> None:
    """Its tokens and calls are those of the first call at which they have been the same for `patience` calls."""
    options = {"solver": solver, "num_calls": 12, "time_grid": "quadratic", "seed": 2}
    seen: list[Estimate] = []
    generate(self_conditioned, observe=seen.append, **options)
    early = generate(self_conditioned, patience=patience, **options)
    for row in set(ALL) - {WITHOUT_TARGET}:
        tokens = [estimate.tokens_bl[row].tolist() for estimate in seen]
        same = [later == sooner for sooner, later in pairwise(tokens)]  # at call i + 1
        done = [i for i in range(len(tokens)) if i >= patience and all(same[i - patience : i])]
        last = done[0] if done else len(tokens) - 1
        assert early.calls_b[row] == last + 1
        assert early.tokens_bl[row].tolist() == tokens[last]


def test_the_denoiser_runs_only_on_rows_that_are_not_done(self_conditioned: DiffusionModel) -> None:
    with Shown(self_conditioned) as shown:
        calls_b = generate(self_conditioned, num_calls=12, time_grid="quadratic", patience=1).calls_b
    assert len(set(calls_b.tolist())) > 3  # or this would show little
    expected = [int((calls_b > call).sum()) for call in range(int(calls_b.max()))]
    assert [len(call[0]) for call in shown.calls] == expected


def test_a_row_that_never_settles_has_all_calls(model: DiffusionModel) -> None:
    assert (generate(model, [0, 1, 2], num_calls=6, patience=6).calls_b == 6).all()


# Observing.


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


def test_rows_that_are_done_are_observed_as_they_are(self_conditioned: DiffusionModel) -> None:
    """And when all are, there is nothing left to observe."""
    seen: list[Estimate] = []
    samples = generate(self_conditioned, observe=seen.append, num_calls=30, time_grid="quadratic", patience=1)
    assert len(seen) == samples.calls_b.max() < 30
    for row in ALL:
        for estimate in seen[int(samples.calls_b[row]) :]:
            assert torch.equal(estimate.tokens_bl[row], samples.tokens_bl[row])


# Mistakes.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_calls": 0}, ["num_calls = 0", "1 or more"]),
        ({"solver": "dpm"}, ["solver = dpm", *SOLVERS]),
        ({"time_grid": "even"}, ["time_grid = even", *TIME_GRIDS]),
        ({"seed": -1}, ["seed = -1", "0 to 4294967295"]),
        ({"seed": 2**32}, ["seed = 4294967296"]),
        ({"temperature": -0.1}, ["temperature = -0.1", "at least 0"]),
        ({"temperature": math.nan}, ["temperature = nan", "finite"]),
        ({"temperature": math.inf}, ["temperature = inf"]),
        ({"guidance": -0.5}, ["guidance = -0.5", "at least 0"]),
        ({"guidance": math.nan}, ["guidance = nan", "finite"]),
        ({"guidance": math.inf}, ["guidance = inf"]),
        ({"threshold": 0.0}, ["threshold = 0.0", "at most 1"]),
        ({"threshold": 1.5}, ["threshold = 1.5"]),
        ({"threshold": math.nan}, ["threshold = nan"]),
        ({"patience": -1}, ["patience = -1", "0 or more"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        SamplerOptions(**options)
    assert all(word in str(refused.value) for word in words)


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    SamplerOptions(num_calls=1, seed=2**32 - 1, temperature=0.0, guidance=0.0, threshold=1.0, patience=0)
