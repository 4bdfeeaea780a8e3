"""How likely a model finds a dataset: an upper bound on nats per token, bits per byte and perplexity.

The bound is that of `mdseq/diffusion/bound.py` or `mdseq/diffusion/orders.py`, summed over the targets of every
document; docs/likelihood.md says how to read it.

Shapes: b rows of a batch, l length, z embedding dimension, n tokens, d documents, t terms of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mdseq.data.corpus import Corpus
from mdseq.data.format import Split
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.bound import DiffusedRows, LevelDensity, RowDraws, bound_terms, observe_levels
from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.estimates import Reading, evidence, with_square
from mdseq.diffusion.orders import absorbing_bound
from mdseq.diffusion.rounding import cross_entropy
from mdseq.errors import UserError
from mdseq.evaluate.rows import ScoredRows
from mdseq.model.denoiser import Vocabulary
from mdseq.model.saved import SavedModel
from mdseq.sparse import Documents

# The pass that decides where levels of noise are drawn: rows, levels of each, intervals of the density.
PILOT_ROWS = 8
PILOT_LEVELS = 64
NUM_INTERVALS = 32

Process = Literal["noise", "absorbing"]
PROCESSES: tuple[Process, ...] = get_args(Process)

_PILOT_PASS, _ESTIMATE_PASS = 0, 1


@dataclass(frozen=True)
class LikelihoodOptions:
    """How to estimate.

    Attributes:
        num_documents: Documents to score, spread evenly over the split; None for all.
        reading: What the denoiser's output is taken for, see `mdseq/diffusion/estimates.py`; None for what samplers do.
        process: What takes the targets away: noise on their embeddings, or their being absorbed in some order; None for
            what `DiffusionModel.absorbs` says.
        num_levels: Denoiser calls for each row (twice as many with self-conditioning), each at another level of noise,
            or with another number of tokens absorbed.
        batch_size: Rows at a time; changes nothing but speed.
        seed: Key of all noise, below 2**32.
    """

    num_documents: int | None = None
    reading: Reading | None = None
    process: Process | None = None
    num_levels: int = 16
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """A ratio of sums over documents, and its standard error; None for a single document."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Likelihood:
    """What the targets of some documents cost, at most.

    Attributes:
        documents, tokens, text_bytes: What was scored: tokens of the targets, and the UTF-8 text that they decode to.
        process: What takes the targets away.
        nats_per_token: The bound; its three terms are below.
        bits_per_byte: The same bits for each byte of text, so that it compares between vocabularies.
        perplexity: e to the nats per token.
        prior, reconstruction, denoising: Nats per token of each term; of the process "absorbing", the last alone.
    """

    documents: int
    tokens: int
    text_bytes: int
    process: Process
    nats_per_token: Measure
    bits_per_byte: Measure
    perplexity: Measure
    prior: Measure
    reconstruction: Measure
    denoising: Measure

    @classmethod
    def of(cls, process: Process, nats_dt: np.ndarray, tokens_d: np.ndarray, bytes_d: np.ndarray) -> Likelihood:
        """From the terms (prior, reconstruction, denoising), the target tokens and the bytes of each document."""
        nats_d = nats_dt.sum(axis=1)
        nats_per_token = ratio_of_sums(nats_d, tokens_d)
        perplexity = math.exp(nats_per_token.value) if nats_per_token.value < math.log(1e300) else math.inf
        error = nats_per_token.standard_error
        prior, reconstruction, denoising = (ratio_of_sums(term_d, tokens_d) for term_d in nats_dt.T)
        return cls(
            documents=len(tokens_d),
            tokens=int(tokens_d.sum()),
            text_bytes=int(bytes_d.sum()),
            process=process,
            nats_per_token=nats_per_token,
            bits_per_byte=ratio_of_sums(nats_d / math.log(2), bytes_d),
            perplexity=Measure(perplexity, None if error is None else perplexity * error),
            prior=prior,
            reconstruction=reconstruction,
            denoising=denoising,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: what is infinite or undefined is null."""
        return {
            name: {key: number if number is not None and math.isfinite(number) else None for key, number in of.items()}
            if isinstance(of, dict)
            else of
            for name, of in asdict(self).items()
        }


def ratio_of_sums(numerator_d: np.ndarray, denominator_d: np.ndarray) -> Measure:
    """sum(numerator) / sum(denominator), with its standard error over documents drawn independently.

    Longer documents weigh more in both sums, so the error is that of a ratio estimator (Cochran, Sampling Techniques,
    chapter 6): the spread of numerator - ratio * denominator. It holds the noise of the estimates too.
    """
    total = denominator_d.sum()
    ratio = float(numerator_d.sum() / total) if total else math.nan
    count = len(numerator_d)
    if count < 2:
        return Measure(ratio, None)
    residual_d = numerator_d - ratio * denominator_d
    return Measure(ratio, float(np.sqrt((residual_d**2).sum() * count / (count - 1)) / total))


@dataclass(frozen=True)
class Scorer:
    """A model, the documents that it is to judge, and how.

    Attributes:
        rows: The documents as they are scored.
    """

    model: DiffusionModel
    tokenizer: Tokenizer
    corpus: Corpus
    rows: ScoredRows
    options: LikelihoodOptions

    @classmethod
    def of(cls, saved: SavedModel, data: Path, split: Split, options: LikelihoodOptions) -> Scorer:
        """Open a split of a dataset. Raises UserError: there is none, or it does not suit the model."""
        corpus = Corpus.open(data, split)
        tokenizer = Tokenizer.load(saved.tokenizer_path)
        manifest, kind = corpus.manifest, saved.config.document_kind
        if manifest.kind != kind:
            raise UserError(
                f"{data} holds {manifest.kind}s, and the model was trained on {kind}s; give a dataset of {kind}s"
            )
        if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{data} has another vocabulary than the model (tokenizer {manifest.tokenizer_fingerprint[:12]}, the "
                f"model's is {tokenizer.fingerprint[:12]}): build it with --tokenizer {saved.tokenizer_path}"
            )
        documents = _spread(options.num_documents, corpus.num_documents)
        rows = ScoredRows.of(corpus, documents, saved.config.row_length)
        model = DiffusionModel.of(saved)
        if options.process == "absorbing" and not model.absorption.gamma:
            raise UserError(
                "the process absorbing needs a model with an absorbing state, and this one has none; take the process "
                "noise, or train with diffusion.absorbing = true and a diffusion.gamma above 0"
            )
        return cls(replace(model, reading=options.reading or model.reading), tokenizer, corpus, rows, options)

    @property
    def process(self) -> Process:
        """What takes the targets away."""
        return self.options.process or ("absorbing" if self.model.absorbs else "noise")

    @torch.no_grad()
    def score(self, advance: Callable[[], None] = lambda: None) -> Likelihood:
        """Score the documents; `advance` is called for every row that is done."""
        density = self._fitted_density() if self.process == "noise" else None
        num_documents = int(self.rows.document.max()) + 1
        nats_dt = np.zeros((num_documents, 3))
        tokens_d, bytes_d = np.zeros((2, num_documents), dtype=np.int64)
        for batch in self.rows.batches(self.options.batch_size):
            tokens_bl, target_bl = self._tokens(batch)
            nats_bt = self._terms(tokens_bl, target_bl, batch, density)
            np.add.at(nats_dt, batch.document, nats_bt.cpu().numpy())
            np.add.at(tokens_d, batch.document, target_bl.sum(dim=1).numpy())
            bytes_bl = self.tokenizer.text_bytes[tokens_bl.numpy()] * target_bl.numpy()
            np.add.at(bytes_d, batch.document, bytes_bl.sum(axis=1))
            for _ in range(len(batch)):
                advance()
        return Likelihood.of(self.process, nats_dt, tokens_d, bytes_d)

    def _terms(self, tokens_bl: Tensor, target_bl: Tensor, rows: ScoredRows, density: LevelDensity | None) -> Tensor:
        """Prior, reconstruction and denoising of each row, float64 [b, t]."""
        draws, num_levels = self._draws(rows, _ESTIMATE_PASS), self.options.num_levels
        if density is None:
            given, on_device_bl = self._given(tokens_bl, target_bl, rows)
            nats_b = absorbing_bound(given, on_device_bl, draws, num_levels)
            return torch.stack([torch.zeros_like(nats_b), torch.zeros_like(nats_b), nats_b], dim=1)
        terms = bound_terms(self._diffused(tokens_bl, target_bl, rows), draws, density, num_levels)
        return torch.stack([terms.prior_b, terms.reconstruction_b, terms.denoising_b], dim=1)

    def _fitted_density(self) -> LevelDensity:
        """Where levels are drawn: by what some rows, spread evenly, show with noise of their own."""
        density = self._even_density()
        log_snr, integrand = [], []
        pilot = self.rows.take(_spread(PILOT_ROWS, len(self.rows)))
        for batch in pilot.batches(self.options.batch_size):
            tokens_bl, target_bl = self._tokens(batch)
            diffused = self._diffused(tokens_bl, target_bl, batch)
            seen = observe_levels(diffused, self._draws(batch, _PILOT_PASS), density, PILOT_LEVELS)
            count_b = diffused.target_bl.sum(dim=1).clamp(min=1)
            log_snr.append(seen.log_snr_kb.flatten().cpu())
            integrand.append((seen.integrand_kb / count_b).flatten().cpu())
        return density.fitted(torch.cat(log_snr), torch.cat(integrand))

    def _even_density(self) -> LevelDensity:
        table_t = self.model.schedule.log_snr_t
        return LevelDensity.even(table_t[-1].item(), table_t[0].item(), NUM_INTERVALS)

    def _tokens(self, rows: ScoredRows) -> tuple[Tensor, Tensor]:
        """Tokens, PAD beyond each row's, and which of them are targets: [b, l] each, on the host."""
        tokens_bl = np.full((len(rows), int(rows.length.max())), SpecialToken.PAD, dtype=np.int64)
        for b, (position, length) in enumerate(zip(rows.position.tolist(), rows.length.tolist(), strict=True)):
            self.corpus.read(position, tokens_bl[b, :length])
        place_l = np.arange(tokens_bl.shape[1])
        target_bl = (place_l >= rows.source_length[:, None]) & (place_l < rows.length[:, None])
        return torch.from_numpy(tokens_bl), torch.from_numpy(target_bl)

    def _diffused(self, tokens_bl: Tensor, target_bl: Tensor, rows: ScoredRows) -> DiffusedRows:
        return diffused_rows(*self._given(tokens_bl, target_bl, rows))

    def _given(self, tokens_bl: Tensor, target_bl: Tensor, rows: ScoredRows) -> tuple[GivenRows, Tensor]:
        """The rows and their tokens, where the model is."""
        device = self.model.m_z.device
        length_b = torch.from_numpy(rows.length).to(device)
        source_length_b = None
        if self.corpus.manifest.kind == "pair":
            source_length_b = torch.from_numpy(rows.source_length).to(device)
        documents = Documents.whole(length_b, tokens_bl.shape[1], source_length_b)
        tokens_bl = tokens_bl.to(device)
        return GivenRows.of(self.model, tokens_bl, target_bl.to(device), documents), tokens_bl

    def _draws(self, rows: ScoredRows, pass_index: int) -> RowDraws:
        row_b, document_b, part_b = (
            torch.from_numpy(ids).to(self.model.m_z.device) for ids in (rows.row, rows.document, rows.part)
        )
        return RowDraws(self.options.seed, pass_index, row_b, document_b, part_b)


def _spread(wanted: int | None, count: int) -> np.ndarray:
    """Indices below `count`, evenly spaced: `wanted` of them, or all."""
    wanted = count if wanted is None else min(wanted, count)
    return np.arange(wanted) * count // wanted


def diffused_rows(given: GivenRows, tokens_bl: Tensor) -> DiffusedRows:
    """Rows as the bound of noise takes them."""
    model, target_bl = given.model, given.target_bl
    schedule, m_z = model.schedule, model.m_z
    noisiest, cleanest = schedule.log_snr_t[-1].item(), schedule.log_snr_t[0].item()
    even = Vocabulary(given.reader.embedding_vz, torch.zeros_like(given.reader.embedding_vz[:, 0]))

    def predict(u_blz: Tensor, log_snr_b: Tensor) -> Tensor:
        z_blz, timestep_b = u_blz + m_z, schedule.timestep_of(log_snr_b)
        clean_blz = given.predict(z_blz, timestep_b).clean_blz
        if model.denoiser.config.self_conditioning:
            clean_blz = given.predict(z_blz, timestep_b, clean_blz).clean_blz
        return clean_blz - m_z

    def reconstruct(u_blz: Tensor) -> Tensor:
        """By what u says alone, by Bayes' rule with all tokens equally likely: the same whatever the denoiser."""
        level_bl = torch.full_like(target_bl, cleanest, dtype=torch.float64)
        x_ny = evidence(u_blz + m_z, level_bl, m_z)[target_bl]
        _, nats_n = cross_entropy(x_ny, with_square(even), tokens_bl[target_bl], torch.ones_like(x_ny[:, 0]))
        row_n = target_bl.nonzero()[:, 0]
        return torch.zeros(len(u_blz), dtype=torch.float64, device=u_blz.device).index_add_(0, row_n, nats_n.double())

    # The embeddings of the targets too: GivenRows embeds every token, and a model cannot look at them in there.
    return DiffusedRows(given.source_blz - m_z, target_bl, predict, reconstruct, noisiest, cleanest)
