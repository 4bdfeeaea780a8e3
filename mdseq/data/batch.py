"""The unit that the model eats: one micro-batch of packed rows.

Shapes: b rows, l slots of a row, m documents of a row, p pieces of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mdseq.data.corpus import Corpus
from mdseq.data.packing import Pieces
from mdseq.data.tokenizer import SpecialToken
from mdseq.sparse.documents import NO_DOCUMENT, Documents, leading_source


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
    position_bl: int64, position within the document's piece, 0 where the piece starts and at padding; the target of a
        pair counts from 1 again.
    target_bl: bool, the positions to be denoised.
    row_b: int64, row index in the packing: the key of the row's noise.
    first_document_b: int64, documents of the global batch that stand in rows before this one.
    source_length_bm: int64, tokens of each document before its first target; on the host, wherever the rest is.
    num_documents: most documents in any row of this micro-batch, at least 1.
    """

    tokens_bl: Tensor
    document_bl: Tensor
    position_bl: Tensor
    target_bl: Tensor
    row_b: Tensor
    first_document_b: Tensor
    source_length_bm: Tensor
    num_documents: int
    step: int
    totals: StepTotals

    def documents(self, num_source_global: int = 0) -> Documents:
        """What attention needs to know of the rows, the first `num_source_global` tokens of each source global."""
        documents = Documents(self.document_bl, self.position_bl, self.num_documents)
        if not num_source_global:
            return documents
        count_b = self.source_length_bm.clamp(max=num_source_global).sum(dim=1).tolist()
        return documents.marked(
            leading_source(documents, self.target_bl, num_source_global), (min(count_b), max(count_b))
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; from pinned memory, the host does not wait for the copies."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without the host's help."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def split(self, num_rows: int) -> list[Batch]:
        """Batches of `num_rows` rows each: views into this one."""
        parts = []
        for first in range(0, len(self.row_b), num_rows):
            part = self._with_tensors(partial(torch.narrow, dim=0, start=first, length=num_rows))
            source_length_bm = self.source_length_bm[first : first + num_rows]
            num_documents = int(part.document_bl.max()) + 1
            parts.append(replace(part, source_length_bm=source_length_bm, num_documents=num_documents))
        return parts

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            tokens_bl=change(self.tokens_bl),
            document_bl=change(self.document_bl),
            position_bl=change(self.position_bl),
            target_bl=change(self.target_bl),
            row_b=change(self.row_b),
            first_document_b=change(self.first_document_b),
        )


@dataclass(frozen=True)
class RowPlan:
    """Rows before their tokens are read.

    row_b, first_document_b: int64, as in Batch.
    pieces: what the rows hold; `pieces.row` counts within `row_b`, and every row has a piece.
    target_start_p, target_end_p: int64, first position of each piece that is denoised, and the first after it that is
        not: what stands before and behind stays clean.
    pairs: whether what stands before is the source of a pair.
    """

    row_b: np.ndarray
    first_document_b: np.ndarray
    pieces: Pieces
    target_start_p: np.ndarray
    target_end_p: np.ndarray
    pairs: bool

    def take(self, rows: np.ndarray) -> RowPlan:
        """The plan of some of its rows alone, given by ascending indices."""
        index_b = np.full(len(self.row_b), -1)
        index_b[rows] = np.arange(len(rows))
        (chosen,) = np.nonzero(index_b[self.pieces.row] >= 0)
        pieces = self.pieces.select(chosen)
        return RowPlan(
            self.row_b[rows],
            self.first_document_b[rows],
            replace(pieces, row=index_b[pieces.row]),
            self.target_start_p[chosen],
            self.target_end_p[chosen],
            self.pairs,
        )


def collate(corpus: Corpus, plan: RowPlan, row_length: int, step: int, totals: StepTotals) -> Batch:
    """Lay the planned rows out as tensors; each token is copied once, from the mapped file into the batch."""
    pieces, (num_rows, num_pieces) = plan.pieces, (len(plan.row_b), len(plan.pieces))
    first_piece_b = np.searchsorted(pieces.row, np.arange(num_rows))
    before_p = np.cumsum(pieces.length) - pieces.length  # tokens of the pieces before, in all rows
    slot_p = before_p - before_p[first_piece_b][pieces.row]
    document_p = np.arange(num_pieces) - first_piece_b[pieces.row]

    tokens_bl = np.full((num_rows, row_length), SpecialToken.PAD, dtype=np.int64)
    document_bl = np.full_like(tokens_bl, NO_DOCUMENT)
    position_bl = np.zeros_like(tokens_bl)
    target_bl = np.zeros_like(tokens_bl, dtype=bool)
    filled_bl = np.arange(row_length) < np.add.reduceat(pieces.length, first_piece_b)[:, None]
    document_bl[filled_bl] = np.repeat(document_p, pieces.length)
    position_bl[filled_bl] = np.arange(pieces.length.sum()) - np.repeat(before_p, pieces.length)
    start_n = np.repeat(plan.target_start_p, pieces.length)
    position_n = position_bl[filled_bl]
    target_bl[filled_bl] = (position_n >= start_n) & (position_n < np.repeat(plan.target_end_p, pieces.length))
    if plan.pairs:
        position_bl[filled_bl] = position_n - np.where(position_n < start_n, 0, np.maximum(start_n - 1, 0))

    # Pieces that are neighbours in a row and in the corpus are read in one go.
    offset_p = pieces.position - before_p
    starts = [0, *(np.nonzero((np.diff(offset_p) != 0) | (np.diff(pieces.row) != 0))[0] + 1).tolist()]
    lengths = np.add.reduceat(pieces.length, starts).tolist()
    for start, length in zip(starts, lengths, strict=True):
        row, slot, position = int(pieces.row[start]), int(slot_p[start]), int(pieces.position[start])
        corpus.read(position, tokens_bl[row, slot : slot + length])
    source_length_bm = np.zeros((num_rows, int(document_p.max()) + 1), dtype=np.int64)
    source_length_bm[pieces.row, document_p] = plan.target_start_p
    return Batch(
        tokens_bl=torch.from_numpy(tokens_bl),
        document_bl=torch.from_numpy(document_bl),
        position_bl=torch.from_numpy(position_bl),
        target_bl=torch.from_numpy(target_bl),
        row_b=torch.from_numpy(plan.row_b),
        first_document_b=torch.from_numpy(plan.first_document_b),
        source_length_bm=torch.from_numpy(source_length_bm),
        num_documents=source_length_bm.shape[1],
        step=step,
        totals=totals,
    )
