"""The unit that the model eats: one micro-batch of packed rows.

Shapes: b rows, l slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdseq.data.corpus import Corpus
from mdseq.data.packing import Piece
from mdseq.data.tokenizer import SpecialToken
from mdseq.sparse.documents import NO_DOCUMENT, Documents


@dataclass(frozen=True)
class StepTotals:
    """Sums over the whole global batch of a step (all ranks, all micro-batches): the loss's denominators."""

    rows: int
    tokens: int
    target_tokens: int
    documents: int
    micro_batches: int


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with what keeps their documents apart.

    tokens_bl: int64, PAD where there is no document.
    document_bl: int64, index of the document within its row, -1 at padding.
    position_bl: int64, position within the document's piece (0 where the piece starts), 0 at padding.
    target_bl: bool, the positions to be denoised.
    row_b: int64, row index in the packing: the key of the row's noise.
    num_documents: most documents in any row of this micro-batch, at least 1.
    """

    tokens_bl: Tensor
    document_bl: Tensor
    position_bl: Tensor
    target_bl: Tensor
    row_b: Tensor
    num_documents: int
    step: int
    totals: StepTotals

    @property
    def documents(self) -> Documents:
        """What attention needs to know of the rows."""
        return Documents(self.document_bl, self.position_bl, self.num_documents)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens_bl=self.tokens_bl.to(device),
            document_bl=self.document_bl.to(device),
            position_bl=self.position_bl.to(device),
            target_bl=self.target_bl.to(device),
            row_b=self.row_b.to(device),
        )


class RowPlan(NamedTuple):
    """A row before its tokens are read: `source_lengths` says how many leading tokens of each piece stay clean."""

    row: int
    pieces: tuple[Piece, ...]
    source_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(piece.length for piece in self.pieces)


def collate(corpus: Corpus, plans: Sequence[RowPlan], row_length: int, step: int, totals: StepTotals) -> Batch:
    """Lay the planned rows out as tensors; each token is copied once, from the mapped file into the batch."""
    shape = (len(plans), row_length)
    tokens_bl = np.full(shape, SpecialToken.PAD, dtype=np.int64)
    document_bl = np.full(shape, NO_DOCUMENT, dtype=np.int64)
    position_bl = np.zeros(shape, dtype=np.int64)
    target_bl = np.zeros(shape, dtype=bool)
    for b, plan in enumerate(plans):
        begin = 0
        for document, (piece, source_length) in enumerate(zip(plan.pieces, plan.source_lengths, strict=True)):
            end = begin + piece.length
            tokens_bl[b, begin:end] = corpus.tokens(*piece)
            document_bl[b, begin:end] = document
            position_bl[b, begin:end] = np.arange(piece.length)
            target_bl[b, begin + source_length : end] = True
            begin = end
    return Batch(
        tokens_bl=torch.from_numpy(tokens_bl),
        document_bl=torch.from_numpy(document_bl),
        position_bl=torch.from_numpy(position_bl),
        target_bl=torch.from_numpy(target_bl),
        row_b=torch.tensor([plan.row for plan in plans]),
        num_documents=max(len(plan.pieces) for plan in plans),
        step=step,
        totals=totals,
    )
