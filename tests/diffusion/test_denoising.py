"""What the denoiser is shown of rows whose source is given: the same in sampling as in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.denoising import DiffusionModel, GivenRows, Prediction
from mdseq.diffusion.estimates import READINGS, Reader, Reading
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.saved import ModelConfig, SavedModel
from mdseq.sparse import Documents
from mdseq.spec import load_spec
from tests.diffusion.batches import make_batch, tiny_objective
from tests.sparse.layouts import pack

VOCAB, LENGTH, DIM, T = 24, 14, 8, 40
TIMESTEP_B = torch.tensor([0.0, 12.75, 39.0])


def denoiser_of(*overrides: str) -> Denoiser:
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=8",
        "diffusion.normalise_embeddings=false",
    ]  # fmt: skip
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig.of(load_spec(None, [*tiny, *overrides]).spec, VOCAB)).eval()
    with torch.no_grad():
        denoiser.output[-1].weight.mul_(100)  # nothing is learned, but something is said
    return denoiser


def model_of(*overrides: str, reading: Reading = "output") -> DiffusionModel:
    denoiser = denoiser_of("diffusion.self_conditioning=0", *overrides)
    absorption = Absorption(0.5)
    return DiffusionModel(denoiser, torch.linspace(-1, 1, DIM), NoiseSchedule("sqrt", T), absorption, reading)


def some_rows() -> tuple[Tensor, Tensor, Documents]:
    """Tokens, targets and documents of three rows: a source and its target, two of them, and nothing given."""
    tokens_bl = torch.randint(5, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    target_bl = torch.zeros(3, LENGTH, dtype=torch.bool)
    target_bl[0, 5:12] = True
    target_bl[1, 2:6] = target_bl[1, 9:14] = True
    target_bl[2, :10] = True
    return tokens_bl, target_bl, pack([[12], [6, 8], [10]], LENGTH)


class Shown:
    """Remembers the arguments of a denoiser's calls, and what they gave."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.calls: list[tuple[Tensor, Tensor, Documents, Tensor | None]] = []
        self.outputs: list[Tensor] = []
        denoiser.register_forward_pre_hook(lambda _, args: self.calls.append(args))
        denoiser.register_forward_hook(lambda _, __, output: self.outputs.append(output))


def noise(seed: int = 1) -> Tensor:
    return torch.randn(3, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))


def test_sources_are_clean_and_targets_have_the_time_of_their_row() -> None:
    model = model_of()
    tokens_bl, target_bl, documents = some_rows()
    shown = Shown(model.denoiser)
    z_blz = noise()
    GivenRows.of(model, tokens_bl, target_bl, documents).predict(z_blz, TIMESTEP_B)
    ((seen_blz, time_bl, _, estimate_blz),) = shown.calls
    assert torch.equal(seen_blz[target_bl], z_blz[target_bl])
    assert torch.equal(seen_blz[~target_bl], model.denoiser.embed(tokens_bl)[~target_bl])
    assert (time_bl[~target_bl] == 0).all()
    for b, time in enumerate([0.0, 318.75, 975.0]):
        assert (time_bl[b][target_bl[b]] == time).all()
    assert estimate_blz is None


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
def test_only_targets_of_what_is_handed_in_are_looked_at(reading: Reading) -> None:
    model = model_of("diffusion.self_conditioning=0.5", reading=reading)
    tokens_bl, target_bl, documents = some_rows()
    rows = GivenRows.of(model, tokens_bl, target_bl, documents)
    z_blz, estimate_blz = noise(1), noise(2)
    elsewhere = ~target_bl[..., None]

    def clean(z_blz: Tensor, estimate_blz: Tensor | None) -> Tensor:
        return rows.predict(z_blz, TIMESTEP_B, estimate_blz).clean_blz[target_bl]

    x_nz = clean(z_blz, estimate_blz)
    assert torch.equal(x_nz, clean(z_blz.masked_fill(elsewhere, 9.0), estimate_blz))
    assert torch.equal(x_nz, clean(z_blz, estimate_blz.masked_fill(elsewhere, 9.0)))
    assert not torch.equal(x_nz, clean(z_blz, None))
    assert torch.equal(clean(z_blz, None), clean(z_blz, torch.zeros_like(estimate_blz)))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("reading", READINGS)
def test_the_output_is_guided_then_read_at_the_time_of_its_row(reading: Reading, guidance: float) -> None:
    model = model_of(reading=reading)
    tokens_bl, target_bl, documents = some_rows()
    rows = GivenRows.of(model, tokens_bl, target_bl, documents)
    shown, z_blz = Shown(model.denoiser), noise()
    z_blz[0, 7] = model.m_z  # what was absorbed says nothing of its token
    prediction = rows.predict(z_blz, TIMESTEP_B, guidance=guidance)
    f_blz = shown.outputs[0]
    if guidance != 1:
        f_blz = guidance * f_blz + (1 - guidance) * shown.outputs[1]
        assert torch.equal(shown.calls[1][0][target_bl], z_blz[target_bl])
        assert (shown.calls[1][0][~target_bl] == model.m_z).all()
    reader = Reader.of(reading, model.denoiser.vocabulary(), model.m_z)
    for b, timestep in enumerate(TIMESTEP_B.tolist()):
        log_snr_bl = torch.full((1, LENGTH), model.schedule.levels([timestep])[0].log_snr, dtype=torch.float64)
        row, here_l = slice(b, b + 1), target_bl[b]
        scores_bly = reader.scores(f_blz[row], z_blz[row], log_snr_bl)
        clean_blz = reader.clean(f_blz[row], scores_bly, target_bl[row])
        torch.testing.assert_close(prediction.scores_bly[b][here_l], scores_bly[0][here_l], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prediction.clean_blz[b][here_l], clean_blz[0][here_l], rtol=1e-4, atol=1e-5)


def test_without_source_nothing_is_known_of_it() -> None:
    """Not even the tokens' embeddings; m stands there, of which the denoiser is told no time."""
    model = model_of()
    tokens_bl, target_bl, documents = some_rows()
    shown = Shown(model.denoiser)
    for tokens in (tokens_bl, tokens_bl.flip(0)):
        GivenRows.of(model, tokens, target_bl, documents).without_source().predict(noise(), TIMESTEP_B)
    (seen_blz, time_bl, _, _), again = shown.calls
    assert torch.equal(seen_blz, again[0])
    assert (seen_blz[~target_bl] == model.m_z).all()
    assert (time_bl[~target_bl] == 2000).all()
    assert torch.equal(seen_blz[target_bl], noise()[target_bl])


def test_a_source_is_dropped_as_in_training() -> None:
    objective = tiny_objective("diffusion.condition_dropout=1.0")
    batch = make_batch([[(4, 6), (3, 5)], [(6, 12)]])
    documents = batch.documents()
    source_bl = documents.real_bl & ~batch.target_bl
    shown = Shown(objective.denoiser)
    objective(batch)
    rows = GivenRows.of(objective.model(), batch.tokens_bl, batch.target_bl, documents)
    rows.without_source().predict(shown.calls[0][0], torch.zeros(2))
    (trained_blz, trained_time_bl, _, _), (seen_blz, time_bl, _, _) = shown.calls
    assert torch.equal(seen_blz[source_bl], trained_blz[source_bl])
    assert torch.equal(time_bl[source_bl], trained_time_bl[source_bl])


def test_sources_are_marked_global_as_in_training() -> None:
    objective = tiny_objective("attention.num_source_global=3")
    batch = make_batch([[(4, 6), (2, 5)], [(0, 12)]])
    rows = GivenRows.of(objective.model(), batch.tokens_bl, batch.target_bl, batch.documents())
    expected = batch.documents(3)
    assert expected.global_bl is not None
    assert expected.global_bl.sum(dim=1).tolist() == [5, 0]
    assert torch.equal(rows.documents.global_bl, expected.global_bl)


@torch.no_grad()
@pytest.mark.parametrize("index", [[0], [1], [2], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("reading", READINGS)
def test_rows_can_be_taken_out(reading: Reading, index: list[int]) -> None:
    """With or without their source, and though they have other numbers of global tokens."""
    model = model_of("attention.num_source_global=3", reading=reading)
    rows = GivenRows.of(model, *some_rows())
    z_blz = noise()
    taken = rows.take(torch.tensor(index))
    for whole, part in ((rows, taken), (rows.without_source(), taken.without_source())):
        expected: Prediction = whole.predict(z_blz, TIMESTEP_B)
        got = part.predict(z_blz[index], TIMESTEP_B[index])
        here_bl = taken.target_bl
        for name in ("clean_blz", "scores_bly"):
            wanted = getattr(expected, name)[index][here_bl]
            torch.testing.assert_close(getattr(got, name)[here_bl], wanted, rtol=1e-4, atol=1e-5)


def test_a_saved_model_has_the_process_it_was_trained_on() -> None:
    denoiser, m_z = denoiser_of(), torch.ones(DIM)
    config = ModelConfig(
        denoiser=denoiser.config, noise_schedule="cosine", num_timesteps=30, gamma=0.3, absorbing_schedule="uniform",
        document_kind="text", row_length=LENGTH, step=1, noise_factor=2.0, min_signal=0.1, estimate="posterior",
        condition_dropout=0.0, lengths={},
    )  # fmt: skip
    model = DiffusionModel.of(SavedModel(config, denoiser, m_z, Path("tokenizer.model")))
    assert model.denoiser is denoiser
    assert torch.equal(model.m_z, m_z)
    assert (model.schedule.name, model.schedule.num_timesteps) == ("cosine", 30)
    assert model.absorption == Absorption(0.3, "uniform")
    assert torch.equal(model.schedule.log_snr_t, NoiseSchedule("cosine", 30, 2.0, 0.1).log_snr_t)
    assert model.reading == "posterior"
