"""Small objectives, and batches of random tokens whose layout is written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.sparse.documents import NO_DOCUMENT
from mdseq.spec import load_spec

VOCAB = 30
TINY = [
    "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
    "model.feedforward_dim=24", "attention.window=4", "attention.dilation=[1, 2]", "attention.num_global=1",
    "experts.num_experts=4", "experts.feedforward_dim=12", "diffusion.num_timesteps=20", "data.row_length=24",
    "report.sample_interval_steps=0",
]  # fmt: skip


def tiny_objective(*overrides: str) -> DiffusionObjective:
    """The same weights at every call."""
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
        num_documents=max(1, int(batch.document_bl[index].max()) + 1),
        totals=replace(batch.totals, micro_batches=micro_batches or batch.totals.micro_batches),
    )
