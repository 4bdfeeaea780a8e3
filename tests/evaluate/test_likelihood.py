"""Scoring a dataset: what is counted, that the number is right where it is known, and the command.

Shapes: b rows, l length, z embedding dimension, v vocabulary, r rows, d documents, t terms of the bound.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.cli import evaluate
from mdseq.data.corpus import Corpus
from mdseq.data.tokenizer import Tokenizer
from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.bound import DiffusedRows, LevelDensity, RowDraws, bound_terms
from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.estimates import READINGS, Reader, Reading
from mdseq.diffusion.schedule import NoiseSchedule, alpha_sigma_of
from mdseq.errors import UserError
from mdseq.evaluate import likelihood
from mdseq.evaluate.likelihood import (
    PROCESSES,
    Likelihood,
    LikelihoodOptions,
    Process,
    Scorer,
    diffused_rows,
    ratio_of_sums,
)
from mdseq.evaluate.rows import ScoredRows
from mdseq.model.denoiser import Denoiser, DenoiserConfig, Vocabulary
from mdseq.model.saved import ModelConfig, SavedModel, load_model, save_model
from mdseq.sparse import Documents
from mdseq.spec import load_spec

ROW_LENGTH = 64
OPTIONS = LikelihoodOptions(num_documents=6, num_levels=4)


def saved_model(folder: Path, data: Path, kind: str, *overrides: str, reading: Reading = "output") -> Path:
    """A model of random weights, with the vocabulary of a dataset."""
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "attention.num_source_global=2",
        "experts.num_experts=4", "experts.feedforward_dim=8",
        "diffusion.normalise_embeddings=false", "diffusion.self_conditioning=0",
    ]  # fmt: skip
    torch.manual_seed(0)
    vocab_size = Tokenizer.load(data / "tokenizer.model").vocab_size
    config = DenoiserConfig.of(load_spec(None, [*tiny, *overrides]).spec, vocab_size)
    denoiser = Denoiser(config)
    weights = [(f"denoiser.{name}", weight) for name, weight in denoiser.named_parameters()]
    model = ModelConfig(
        denoiser=config, noise_schedule="sqrt", num_timesteps=100, gamma=0.5, absorbing_schedule="sigma",
        min_signal=0.0, document_kind=kind,
        row_length=ROW_LENGTH, step=7, estimate=reading, noise_factor=1.0, condition_dropout=0.0, lengths={},
    )  # fmt: skip
    save_model(folder, model, [*weights, ("absorbing.m", torch.full((8,), 0.3))], data / "tokenizer.model")
    return folder


@pytest.fixture(autouse=True)
def short_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds decides how noisy an estimate is, and that is not looked at here."""
    monkeypatch.setattr(likelihood, "PILOT_ROWS", 2)
    monkeypatch.setattr(likelihood, "PILOT_LEVELS", 8)


@pytest.fixture(scope="module")
def text_run(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("runs") / "text", text_dataset, "text")


@pytest.fixture(scope="module")
def pair_run(pair_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ["diffusion.self_conditioning=0.5", "diffusion.normalise_embeddings=true"]
    return saved_model(tmp_path_factory.mktemp("runs") / "pair", pair_dataset, "pair", *overrides)


def score(run: Path, data: Path, options: LikelihoodOptions = OPTIONS) -> Likelihood:
    return Scorer.of(load_model(run), data, "train", options).score()


# What is counted


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_every_target_is_in_one_row(request: pytest.FixtureRequest, kind: str) -> None:
    corpus = Corpus.open(request.getfixturevalue(f"{kind}_dataset"), "train")
    documents = np.arange(corpus.num_documents)[::3]
    rows = ScoredRows.of(corpus, documents, ROW_LENGTH)
    assert kind == "pair" or len(rows) > len(documents)
    scored = [[] for _ in documents]
    for r in range(len(rows)):
        tokens = np.zeros(rows.length[r], dtype=np.int64)
        corpus.read(int(rows.position[r]), tokens)
        assert len(scored[rows.document[r]]) == 0 or rows.part[r] > 0
        scored[rows.document[r]] += tokens[rows.source_length[r] :].tolist()
    for document, targets in zip(documents.tolist(), scored, strict=True):
        assert targets == corpus.tokens(document, corpus.target_start(document)).tolist()
    assert kind == "pair" or rows.length.max() <= ROW_LENGTH
    assert rows.row.tolist() == list(range(len(rows)))


def test_a_pair_longer_than_a_row_stays_whole(pair_dataset: Path) -> None:
    corpus = Corpus.open(pair_dataset, "train")
    documents = np.arange(corpus.num_documents)
    rows = ScoredRows.of(corpus, documents, 8)
    assert rows.length.tolist() == corpus.lengths().tolist()
    assert rows.source_length.tolist() == corpus.target_starts(documents).tolist()


def test_all_tokens_and_bytes_of_a_split(text_run: Path, text_dataset: Path) -> None:
    found = score(text_run, text_dataset, LikelihoodOptions(num_levels=1))
    entry = Corpus.open(text_dataset, "train").manifest.splits["train"]
    assert found.documents == entry.documents
    assert found.tokens == entry.tokens - entry.documents  # all but the first of each
    assert found.text_bytes == entry.text_bytes


def test_bytes_of_pairs_are_those_of_targets(pair_run: Path, pair_dataset: Path) -> None:
    found = score(pair_run, pair_dataset, LikelihoodOptions(num_levels=1))
    corpus, tokenizer = Corpus.open(pair_dataset, "train"), Tokenizer.load(pair_dataset / "tokenizer.model")
    targets = [corpus.tokens(d, corpus.target_start(d)) for d in range(corpus.num_documents)]
    assert found.tokens == sum(map(len, targets))
    assert found.text_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in targets)


def test_batches_hold_every_row_once(text_dataset: Path) -> None:
    rows = ScoredRows.of(Corpus.open(text_dataset, "train"), np.arange(9), ROW_LENGTH)
    batches = list(rows.batches(4))
    assert all(len(batch) <= 4 for batch in batches)
    assert sorted(np.concatenate([batch.row for batch in batches]).tolist()) == list(range(len(rows)))


# The estimate


class BestDenoiser:
    """Of tokens that are drawn evenly and independently: what, read in this way, is the mean of their posterior.

    The embeddings must be equally far from the absorbing state.
    """

    def __init__(self, reading: Reading, centred_vz: Tensor, m_z: Tensor, schedule: NoiseSchedule) -> None:
        self.config = SimpleNamespace(num_source_global=0, self_conditioning=False)
        self.reading, self.centred_vz, self.m_z, self.schedule = reading, centred_vz, m_z, schedule

    def embed(self, tokens: Tensor) -> Tensor:
        return self.centred_vz[tokens] + self.m_z

    def vocabulary(self) -> Vocabulary:
        embedding_vz = self.centred_vz + self.m_z
        return Vocabulary(embedding_vz, -embedding_vz @ self.m_z)

    def __call__(self, z_blz: Tensor, time_bl: Tensor, documents: Documents, estimate_blz: Tensor | None) -> Tensor:
        log_snr_bl = self.schedule.log_snr(time_bl.double() * self.schedule.num_timesteps / 1000)
        alpha_bl1, sigma_bl1 = (value.float()[..., None] for value in alpha_sigma_of(log_snr_bl))
        x_blz = alpha_bl1 / sigma_bl1**2 * (z_blz - self.m_z)
        if self.reading == "output":
            x_blz = (x_blz @ self.centred_vz.T).softmax(dim=-1) @ self.centred_vz
        return self.m_z + (0.0 if self.reading == "posterior" else 1.0) * x_blz


@pytest.mark.parametrize("length", [4.0, 0.4])
@pytest.mark.parametrize("reading", READINGS)
def test_the_best_denoiser_of_even_tokens_reaches_their_entropy(reading: Reading, length: float) -> None:
    """However its output is read, and also where embeddings overlap at t = 0, so that the reconstruction costs."""
    generator = torch.Generator().manual_seed(0)
    centred_vz = length * torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    m_z, schedule = torch.full((16,), 0.4), NoiseSchedule("sqrt", 500)
    model = DiffusionModel(BestDenoiser(reading, centred_vz, m_z, schedule), m_z, schedule, Absorption(0.5), reading)
    tokens_bl = torch.randint(40, (256, 20), generator=generator)
    target_bl = torch.arange(20).expand(256, -1) >= 4
    documents = Documents.whole(torch.full((256,), 20), 20)
    rows = diffused_rows(GivenRows.of(model, tokens_bl, target_bl, documents), tokens_bl)
    row_b = torch.arange(256)
    density = LevelDensity.even(rows.noisiest, rows.cleanest, 32)
    terms = bound_terms(rows, RowDraws(0, 0, row_b, row_b, torch.zeros_like(row_b)), density, 32)
    nats_b = (terms.prior_b + terms.reconstruction_b + terms.denoising_b) / 16
    assert abs(nats_b.mean() - math.log(40)) < 3 * nats_b.std() / 16
    assert nats_b.mean() == pytest.approx(math.log(40), rel=0.02)
    assert (terms.reconstruction_b.mean() / 16 > 0.5) == (length < 1)


@pytest.mark.parametrize("kind", ["text", "pair"])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_batch_size_changes_nothing(request: pytest.FixtureRequest, kind: str, process: Process) -> None:
    run, data = request.getfixturevalue(f"{kind}_run"), request.getfixturevalue(f"{kind}_dataset")
    one, four = (score(run, data, replace(OPTIONS, batch_size=size, process=process)) for size in (1, 4))
    assert one.process == four.process == process
    assert (one.prior.value == one.reconstruction.value == 0) == (process == "absorbing")
    for name in ("nats_per_token", "bits_per_byte", "prior", "reconstruction", "denoising"):
        assert getattr(one, name).value == pytest.approx(getattr(four, name).value, rel=1e-4)
        assert getattr(one, name).standard_error == pytest.approx(getattr(four, name).standard_error, rel=1e-3)
    assert one.nats_per_token.value == pytest.approx(
        one.prior.value + one.reconstruction.value + one.denoising.value, rel=1e-6
    )


def test_the_seed_decides(text_run: Path, text_dataset: Path) -> None:
    options = replace(OPTIONS, num_documents=2)
    first = score(text_run, text_dataset, options)
    assert first == score(text_run, text_dataset, options)
    other = score(text_run, text_dataset, replace(options, seed=1))
    assert other.denoising.value != first.denoising.value
    assert other.prior == first.prior


@pytest.mark.parametrize("reading", READINGS)
def test_self_conditioning_takes_two_passes(pair_run: Path, pair_dataset: Path, reading: Reading) -> None:
    """The second is given what the first, as it is read, predicted at the same level of noise."""
    saved = load_model(pair_run)
    calls: list[tuple[Tensor, ...]] = []

    def watch(module: Denoiser, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((*inputs, output))

    saved.denoiser.register_forward_hook(watch)
    scorer = Scorer.of(saved, pair_dataset, "train", LikelihoodOptions(1, reading, num_levels=3))
    scorer.score()
    assert len(calls) % 2 == 0
    reader, schedule = Reader.of(reading, saved.denoiser.vocabulary(), saved.m_z), scorer.model.schedule
    for (z_blz, time_bl, _, before, first_blz), (same_blz, _, _, given_blz, _) in zip(
        calls[::2], calls[1::2], strict=True
    ):
        assert before is None
        assert torch.equal(same_blz, z_blz)
        target_bl = given_blz.any(dim=-1)
        assert target_bl.any()
        log_snr_bl = schedule.log_snr(time_bl.double() * schedule.num_timesteps / 1000)
        expected_blz = reader.clean(first_blz, reader.scores(first_blz, z_blz, log_snr_bl), target_bl)
        torch.testing.assert_close(given_blz, expected_blz * target_bl[..., None], rtol=1e-3, atol=1e-3)


def test_by_default_the_output_is_taken_for_what_the_model_was_trained_as(
    text_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_model(tmp_path / "model", text_dataset, "text", reading="posterior")
    nats = {
        reading: score(run, text_dataset, replace(OPTIONS, num_documents=2, reading=reading)).nats_per_token.value
        for reading in (None, *READINGS)
    }
    assert nats[None] == nats["posterior"]
    assert len({nats[reading] for reading in READINGS}) == 3
    run_command(run, "--data", text_dataset, "--split", "train", "--documents", 1, "--samples", 1,
                "--output", tmp_path / "found.json")  # fmt: skip
    assert json.loads((tmp_path / "found.json").read_text())["estimate"] == "posterior"


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_rows_are_laid_out_as_in_training(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target of a pair counts its positions from 1 again; a text, or a stretch of one, counts on."""
    run, data = request.getfixturevalue(f"{kind}_run"), request.getfixturevalue(f"{kind}_dataset")
    seen: list[tuple[Tensor, Documents]] = []

    def watched(given: GivenRows, tokens_bl: Tensor) -> DiffusedRows:
        seen.append((given.target_bl, given.documents))
        return diffused_rows(given, tokens_bl)

    monkeypatch.setattr(likelihood, "diffused_rows", watched)
    score(run, data, replace(OPTIONS, num_levels=1))
    for target_bl, documents in seen:
        for target_l, position_l, real_l in zip(target_bl, documents.position_bl, documents.real_bl, strict=True):
            num_given, num_targets = int((real_l & ~target_l).sum()), int(target_l.sum())
            first = 1 if kind == "pair" else num_given
            expected = [*range(num_given), *range(first, first + num_targets)]
            assert position_l[real_l].tolist() == expected


def test_some_documents_are_spread_over_the_split(text_run: Path, text_dataset: Path) -> None:
    """Not the first ones, which may all be of one source."""
    corpus = Corpus.open(text_dataset, "train")
    chosen = [0, corpus.num_documents // 2]
    found = score(text_run, text_dataset, LikelihoodOptions(num_documents=2, num_levels=1))
    assert found.tokens == sum(corpus.length(document) - 1 for document in chosen)
    everything = score(text_run, text_dataset, LikelihoodOptions(num_documents=10**9, num_levels=1))
    assert everything.documents == corpus.num_documents


# The standard error


def test_the_error_of_a_ratio_is_the_spread_of_ratios() -> None:
    """Over many sets of documents, whose nats grow with their length and scatter the more the longer they are."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        tokens_d = rng.integers(10, 1000, size=80)
        found.append(ratio_of_sums(3.0 * tokens_d + rng.normal(size=80) * tokens_d**0.8, tokens_d))
    spread = np.std([measure.value for measure in found])
    assert np.mean([measure.value for measure in found]) == pytest.approx(3.0, abs=3 * spread / 20)
    stated = np.sqrt(np.mean([measure.standard_error**2 for measure in found]))
    assert stated == pytest.approx(spread, rel=0.1)


def test_of_documents_of_one_length_it_is_the_error_of_a_mean() -> None:
    nats_d = np.array([1.0, 3.0, 8.0])
    found = ratio_of_sums(nats_d, np.array([2, 2, 2]))
    assert found.value == 2.0
    assert found.standard_error == pytest.approx(np.std(nats_d / 2, ddof=1) / 3**0.5)


def test_one_document_has_no_error() -> None:
    found = Likelihood.of("noise", np.array([[1.0, 2.0, 3.0]]), np.array([2]), np.array([4]))
    assert found.nats_per_token.value == 3.0
    assert found.perplexity.value == pytest.approx(math.e**3)
    assert found.bits_per_byte.value == pytest.approx(1.5 / math.log(2))
    assert found.nats_per_token.standard_error is found.perplexity.standard_error is None


def test_json_has_no_infinities() -> None:
    found = Likelihood.of("noise", np.full((2, 3), 1e4), np.array([2, 2]), np.array([0, 0])).to_dict()
    json.dumps(found, allow_nan=False)
    assert found["perplexity"]["value"] is found["bits_per_byte"]["value"] is None
    assert found["nats_per_token"] == {"value": 15_000.0, "standard_error": 0.0}
    assert found["tokens"] == 4


# The command


def test_the_command_offers_every_reading_and_process() -> None:
    assert evaluate.ESTIMATES == READINGS
    assert evaluate.PROCESSES == PROCESSES


def run_command(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_command(parser.add_subparsers())
    options = parser.parse_args(["evaluate", "likelihood", *map(str, arguments)])
    options.command(options)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_command(
    text_run: Path, text_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], process: Process
) -> None:
    output = tmp_path / "found.json"
    arguments = (text_run, "--data", text_dataset, "--split", "train", "--documents", 3, "--samples", 2)
    run_command(
        *arguments, "--estimate", "softmax", "--process", process, "--batch_size", 2, "--seed", 5, "--output", output
    )
    found = json.loads(output.read_text())
    expected = score(text_run, text_dataset, LikelihoodOptions(3, "softmax", process, 2, 2, 5))
    assert {key: found[key] for key in expected.to_dict()} == expected.to_dict()
    assert found["step"] == 7
    assert found["split"] == "train"
    captured = capsys.readouterr()
    for text in ("nats per token", f"{expected.nats_per_token.value:,.4f}", "bits per byte", "3 documents"):
        assert text in captured.out
    assert ("reconstruction" in captured.out) == (process == "noise")
    assert captured.err == ""  # no bar where there is no terminal

    with pytest.raises(UserError, match="is never overwritten"):
        run_command(*arguments, "--output", output)
    assert json.loads(output.read_text()) == found


def test_an_output_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        run_command("no_run", "--data", "no_data", "--output", tmp_path / "absent" / "found.json")


def test_data_of_another_kind(text_run: Path, pair_dataset: Path) -> None:
    with pytest.raises(UserError, match=r"holds pairs, and the model was trained on texts"):
        run_command(text_run, "--data", pair_dataset)


def test_data_with_another_vocabulary(text_run: Path, text_dataset: Path, pair_dataset: Path) -> None:
    saved = load_model(text_run)
    other = SavedModel(saved.config, saved.denoiser, saved.m_z, pair_dataset / "tokenizer.model")
    with pytest.raises(UserError, match=r"another vocabulary than the model .* --tokenizer"):
        Scorer.of(other, text_dataset, "train", OPTIONS)


def test_absorbing_needs_an_absorbing_state(text_run: Path, text_dataset: Path) -> None:
    saved = load_model(text_run)
    saved = replace(saved, config=replace(saved.config, gamma=0.0))
    with pytest.raises(UserError, match=r"absorbing state, and this one has none; take the process noise"):
        Scorer.of(saved, text_dataset, "train", LikelihoodOptions(process="absorbing"))


@pytest.mark.parametrize(("gamma", "process"), [(1.0, "absorbing"), (0.5, "noise")])
def test_by_default_targets_are_taken_away_as_in_training(
    text_run: Path, text_dataset: Path, gamma: float, process: Process
) -> None:
    saved = load_model(text_run)
    saved = replace(saved, config=replace(saved.config, gamma=gamma, absorbing_schedule="uniform"))
    nats = {
        way: Scorer.of(saved, text_dataset, "train", replace(OPTIONS, num_documents=2, process=way)).score()
        for way in (None, *PROCESSES)
    }
    assert nats[None] == nats[process]
    assert nats["noise"].nats_per_token != nats["absorbing"].nats_per_token


def test_a_split_without_documents(text_run: Path, text_dataset: Path) -> None:
    with pytest.raises(UserError, match="no documents in its 'test' split"):
        run_command(text_run, "--data", text_dataset, "--split", "test")


def test_no_dataset_and_no_run(text_run: Path, text_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset folder"):
        run_command(text_run, "--data", tmp_path / "absent")
    with pytest.raises(UserError, match="no run folder"):
        run_command(tmp_path / "absent", "--data", text_dataset)
