"""Small objectives, and batches of random tokens whose layout is written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.sparse.documents import NO_DOCUMENT
from mdseq.spec import load_spec

VOCAB = 30

# Rows of documents, each so many tokens of source and of target.
ONE_DOCUMENT_A_ROW = [[(4, 9)], [(2, 20)], [(1, 5)], [(10, 14)], [(0, 24)], [(23, 1)]]
PACKED = [[(4, 6), (2, 5)], [(3, 20)], [(1, 5), (2, 2), (4, 7)], [(0, 8)]]

# Objectives that say of every setting what it is, whatever the defaults are.
SQUARED_ERROR = [
    "diffusion.objective=target", "diffusion.noise_schedule=sqrt", "diffusion.noise_factor=1.0",
    "diffusion.continuous_time=false", "diffusion.timestep_sampling=loss_aware", "diffusion.stratified=false",
    "diffusion.absorbing=true", "diffusion.gamma=0.5", "diffusion.absorbing_weight=0.01",
    "diffusion.denoising_weight=1.0", "diffusion.snr_cap=0.0", "diffusion.anchor_weight=0.0",
    "diffusion.rounding_weight=1.0", "diffusion.estimate=output", "diffusion.normalise_embeddings=false",
    "diffusion.self_conditioning=0.0", "diffusion.self_conditioning_lag=0.1", "diffusion.condition_dropout=0.0",
    "diffusion.source_dropout=0.0",
]  # fmt: skip
PUBLISHED = [*SQUARED_ERROR, "diffusion.objective=published"]
ANCHOR = [*SQUARED_ERROR, "diffusion.anchor_weight=1.0"]
POSTERIOR = [*ANCHOR, "diffusion.estimate=posterior", "diffusion.denoising_weight=0.0"]
EVERYTHING = [
    *POSTERIOR, "diffusion.noise_factor=2.0", "diffusion.continuous_time=true", "diffusion.stratified=true",
    "diffusion.normalise_embeddings=true", "diffusion.self_conditioning=1.0", "diffusion.condition_dropout=0.3",
    "diffusion.source_dropout=0.2",
]  # fmt: skip

TINY = [
    *SQUARED_ERROR,
    "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
    "model.feedforward_dim=24", "attention.window=4", "attention.dilation=[1, 2]", "attention.num_global=1",
    "experts.num_experts=4", "experts.feedforward_dim=12", "diffusion.num_timesteps=20", "data.row_length=24",
    "report.sample_interval_steps=0",
]  # fmt: skip


def tiny_objective(*overrides: str) -> DiffusionObjective:
    """The same weights at every call; trained by SQUARED_ERROR unless the overrides say otherwise."""
    torch.manual_seed(0)
    return DiffusionObjective(load_spec(None, [*TINY, *overrides]).spec, VOCAB)


def make_batch(rows: Sequence[Sequence[tuple[int, int]]], row_length: int = 24, step: int = 3, seed: int = 0) -> Batch:
    """Rows of documents, each given as (source tokens, target tokens), then padding.

    A document's tokens depend on its place in the list only, not on the length of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_bl = torch.full((len(rows), row_length), int(SpecialToken.PAD))
    document_bl = torch.full((len(rows), row_length), NO_DOCUMENT)
    position_bl = torch.zeros(len(rows), row_length, dtype=torch.long)
    target_bl = torch.zeros(len(rows), row_length, dtype=torch.bool)
    for b, documents in enumerate(rows):
        begin = 0
        for document, (source, target) in enumerate(documents):
            end = begin + source + target
            tokens_bl[b, begin:end] = torch.randint(5, VOCAB, (source + target,), generator=generator)
            document_bl[b, begin:end] = document
            position_bl[b, begin:end] = torch.arange(source + target)
            target_bl[b, begin + source : end] = True
            begin = end
    totals = StepTotals(
        rows=len(rows),
        tokens=int((document_bl != NO_DOCUMENT).sum()),
        target_tokens=int(target_bl.sum()),
        documents=sum(len(documents) for documents in rows),
        micro_batches=1,
    )
    most = max(1, *(len(documents) for documents in rows))
    source_length_bm = torch.tensor([[source for source, _ in row] + [0] * (most - len(row)) for row in rows])
    row_b = 10 + torch.arange(len(rows))
    count_b = torch.tensor([len(row) for row in rows])
    first_b = count_b.cumsum(0) - count_b
    return Batch(tokens_bl, document_bl, position_bl, target_bl, row_b, first_b, source_length_bm, most, step, totals)


def take_rows(batch: Batch, rows: Sequence[int], micro_batches: int | None = None) -> Batch:
    """Some rows of a batch, as one of `micro_batches` micro-batches of the same step."""
    index = torch.tensor(rows)
    return replace(
        batch,
        tokens_bl=batch.tokens_bl[index],
        document_bl=batch.document_bl[index],
        position_bl=batch.position_bl[index],
        target_bl=batch.target_bl[index],
        row_b=batch.row_b[index],
        first_document_b=batch.first_document_b[index],
        source_length_bm=batch.source_length_bm[index],
        num_documents=max(1, int(batch.document_bl[index].max()) + 1),
        totals=replace(batch.totals, micro_batches=micro_batches or batch.totals.micro_batches),
    )


def observed(objective: DiffusionObjective, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what went into and came out of the denoiser's last call: z_t, time, f."""
    seen = []
    hook = objective.denoiser.register_forward_hook(lambda _, args, out: seen.append((args[0], args[1], out)))
    loss = objective(batch)
    hook.remove()
    z_t, time, f = seen[-1]
    return loss, z_t.detach(), time, f.detach()
