"""Which tokens share a row: two plans behind one interface.

A row is `row_length` token slots that hold whole documents or pieces of them, one after another from slot 0;
slots left over are padding. A plan is a pure function of the corpus, and a row is found without visiting
those before it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from mdseq.data.corpus import Corpus
from mdseq.errors import UserError


class Piece(NamedTuple):
    """Tokens start..stop of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class Packing(Protocol):
    """A plan: `num_rows` rows of at most `row_length` tokens; every token of the corpus is in exactly one."""

    num_rows: int
    padding_fraction: float  # share of all slots that hold no token

    def row(self, index: int) -> tuple[Piece, ...]: ...


class SplitPacking:
    """Concatenate all documents and cut every `row_length` tokens: only the last row has padding."""

    def __init__(self, corpus: Corpus, row_length: int) -> None:
        self.row_length = row_length
        self.num_rows = -(-corpus.num_tokens // row_length)
        self.padding_fraction = 1 - corpus.num_tokens / (self.num_rows * row_length)
        self._offsets = corpus.offsets

    def row(self, index: int) -> tuple[Piece, ...]:
        assert 0 <= index < self.num_rows
        start = index * self.row_length
        stop = min(start + self.row_length, int(self._offsets[-1]))
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        edges = self._offsets[first : last + 1].tolist()
        return tuple(
            Piece(first + i, max(start, edge) - edge, min(stop, edges[i + 1]) - edge)
            for i, edge in enumerate(edges[:-1])
        )


class WholePacking:
    """Fill rows with whole documents in order (next fit), at most `max_documents_per_row` in each; cut none.

    Raises UserError when a document does not fit in a row.
    """

    def __init__(self, corpus: Corpus, row_length: int, max_documents_per_row: int) -> None:
        _require_fit(np.diff(corpus.offsets), row_length)
        self._offsets = corpus.offsets
        self._first_document = _next_fit(corpus.offsets, row_length, max_documents_per_row)
        self.num_rows = len(self._first_document) - 1
        self.padding_fraction = 1 - corpus.num_tokens / (self.num_rows * row_length)

    def row(self, index: int) -> tuple[Piece, ...]:
        assert 0 <= index < self.num_rows
        first, last = int(self._first_document[index]), int(self._first_document[index + 1])
        lengths = np.diff(self._offsets[first : last + 1]).tolist()
        return tuple(Piece(first + i, 0, length) for i, length in enumerate(lengths))


def _next_fit(offsets: np.ndarray, row_length: int, max_documents_per_row: int) -> np.ndarray:
    """First document of each row, and the number of documents at the end: int64 [num_rows + 1]."""
    num_documents = len(offsets) - 1
    first_document = [0]
    while first_document[-1] < num_documents:
        first = first_document[-1]
        fitting = int(np.searchsorted(offsets, offsets[first] + row_length, side="right")) - 1
        first_document.append(min(fitting, first + max_documents_per_row))
    return np.array(first_document, dtype=np.int64)


def _require_fit(lengths: np.ndarray, row_length: int) -> None:
    num_too_long = int(np.count_nonzero(lengths > row_length))
    if num_too_long:
        raise UserError(
            f"{num_too_long:,} of {len(lengths):,} documents are longer than data.row_length = {row_length:,}"
            f" tokens (the longest has {int(lengths.max()):,}), and whole documents are never cut: "
            "raise data.row_length to at least that, or build the dataset without them"
        )
