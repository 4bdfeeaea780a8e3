"""Training and scoring a model of pairs in plain PyTorch on one device: what comparisons of objectives need, no more.

The rows, their order, the noise, the learning rate and the average of the weights are those of a real run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sacrebleu
import torch

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.corpus import Corpus
from mdseq.data.format import TOKENIZER_FILE
from mdseq.data.loader import Loader
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.rounding import cross_entropy
from mdseq.evaluate.likelihood import LikelihoodOptions, Measure, Scorer
from mdseq.evaluate.rows import ScoredRows
from mdseq.generate.sampler import SamplerOptions, sample
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from mdseq.spec import RunSpec
from mdseq.train.rows import Rows
from mdseq.train.schedule import learning_rate


@dataclass(frozen=True)
class Trained:
    """A trained objective with the average of its weights, and what it cost.

    Attributes:
        seconds: Of the steps alone.
    """

    objective: DiffusionObjective
    seconds: float


def train(
    spec: RunSpec,
    data: Path,
    device: torch.device,
    watch: Callable[[int, float, DiffusionObjective], None] | None = None,
) -> Trained:
    """Take the spec's steps; `watch(step, seconds, average)` is called after each, and its time is not counted."""
    corpus = Corpus.open(data, "train")
    torch.manual_seed(spec.seed)
    objective = DiffusionObjective(spec, corpus.manifest.vocab_size, device).to(device)
    average = copy.deepcopy(objective).eval()
    optimiser = torch.optim.AdamW(
        objective.parameters(),
        betas=spec.optimiser.betas,
        eps=spec.optimiser.epsilon,
        weight_decay=spec.optimiser.weight_decay,
        fused=device.type == "cuda",
    )
    rows = Rows.of(corpus, spec)
    loader = Loader(
        corpus, rows.packing, rows.order, spec.data.row_length, spec.data.batch_size, spec.data.micro_batch_size, 0, 1,
        device=device,
    )  # fmt: skip
    seconds = 0.0
    for step in range(spec.schedule.steps):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, spec.optimiser, spec.schedule)
        micro_batches = loader.micro_batches(step)
        for batch in micro_batches:
            (objective(batch.to(device)) / len(micro_batches)).backward()
        if spec.optimiser.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(objective.parameters(), spec.optimiser.gradient_clipping)
        optimiser.step()
        optimiser.zero_grad()
        objective.timesteps.end_step()
        if objective.balance is not None:
            objective.balance.end_step()
        decay = min(spec.optimiser.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(objective.parameters()), 1 - decay)
        if device.type == "cuda" and step % 50 == 0:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        if watch is not None:
            watch(step + 1, seconds, average)
    loader.close()
    return Trained(average, seconds)


class PairTask:
    """Held-out pairs: how well a model predicts their targets, and how well it writes them."""

    def __init__(self, data: Path, split: str, num_pairs: int, device: torch.device) -> None:
        self.corpus = corpus = Corpus.open(data, split)
        self.device = device
        self.tokenizer = Tokenizer.load(data / TOKENIZER_FILE)
        self.documents = np.linspace(0, corpus.num_documents - 1, min(num_pairs, corpus.num_documents)).astype(int)
        self.tokens = [corpus.tokens(int(i)).astype(np.int64) for i in self.documents]
        self.source_lengths = [corpus.target_start(int(i)) for i in self.documents]
        order = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))  # rows of like lengths share a batch
        self.tokens = [self.tokens[i] for i in order]
        self.source_lengths = [self.source_lengths[i] for i in order]

    def batches(self, rows: int = 64) -> list[Batch]:
        """All pairs, one a row, for the objective and for sampling."""
        batches = []
        for first in range(0, len(self.tokens), rows):
            tokens, sources = self.tokens[first : first + rows], self.source_lengths[first : first + rows]
            length = max(map(len, tokens))
            tokens_bl = torch.full((len(tokens), length), int(SpecialToken.PAD))
            for row_l, document in zip(tokens_bl, tokens, strict=True):
                row_l[: len(document)] = torch.from_numpy(document)
            source_b = torch.tensor(sources)
            whole = Documents.whole(torch.tensor([len(document) for document in tokens]), length, source_b)
            target_bl = whole.real_bl & (torch.arange(length) >= source_b[:, None])
            totals = StepTotals(len(tokens), int(whole.real_bl.sum()), int(target_bl.sum()), len(tokens), 1)
            row_b = first + torch.arange(len(tokens))
            batch = Batch(
                tokens_bl, whole.document_bl, whole.position_bl, target_bl, row_b, torch.arange(len(tokens)),
                source_b[:, None], num_documents=1, step=0, totals=totals,
            )  # fmt: skip
            batches.append(batch.to(self.device))
        return batches

    @torch.no_grad()
    def cross_entropy_from_noise(self, model: DiffusionModel) -> float:
        """Mean -log p(w | z_t) of target tokens at t = T - 1, in nats: what the source alone says."""
        total, count = 0.0, 0
        for batch in self.batches():
            rows = GivenRows.of(model, batch.tokens_bl, batch.target_bl, batch.documents())
            noise_blz = NoiseKey(0, 0, batch.row_b).normal(Purpose.STARTING, *rows.source_blz.shape[1:])
            timestep_b = torch.full_like(batch.row_b, model.schedule.last, dtype=torch.float64)
            scores_bly = rows.predict(noise_blz + model.m_z, timestep_b).scores_bly
            token_n = batch.tokens_bl[batch.target_bl]
            loss, _ = cross_entropy(
                scores_bly[batch.target_bl], rows.reader.scored, token_n, torch.ones_like(token_n, dtype=torch.float32)
            )
            total, count = total + loss.item(), count + len(token_n)
        return total / count

    def bound(self, model: DiffusionModel) -> Measure:
        """The likelihood bound in nats per target token, the model read as it was trained."""
        rows = ScoredRows.of(self.corpus, self.documents, row_length=2**20)
        options = LikelihoodOptions(num_levels=16, batch_size=64)
        scorer = Scorer(model, self.tokenizer, self.corpus, rows, options)
        return scorer.score().nats_per_token

    def bleu(self, model: DiffusionModel, options: SamplerOptions) -> tuple[float, float]:
        """Corpus BLEU-4 over whitespace tokens, unsmoothed (multi-bleu.perl's), and mean calls; lengths are given."""
        hypotheses, references, calls = [], [], 0
        for batch in self.batches():
            documents = batch.documents()
            samples = sample(model, batch.tokens_bl, batch.target_bl, documents, batch.row_b, options)
            calls += int(samples.calls_b.sum())
            for tokens, goal, target in zip(samples.tokens_bl, batch.tokens_bl, batch.target_bl, strict=True):
                hypotheses.append(self._text(tokens[target]))
                references.append(self._text(goal[target]))
        score = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", smooth_method="none", force=True).score
        return score, calls / len(hypotheses)

    def _text(self, tokens: torch.Tensor) -> str:
        ids = tokens.tolist()
        end = ids.index(SpecialToken.EOS) if SpecialToken.EOS in ids else len(ids)
        return self.tokenizer.decode([i for i in ids[:end] if i >= len(SpecialToken)])
