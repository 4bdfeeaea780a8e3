"""Which tokens share a row: two plans behind one interface.

A row is `row_length` token slots that hold whole documents or pieces of them, one after another from slot 0;
slots left over are padding. A plan is a pure function of the corpus, and a row is found without visiting
those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np

from mdseq.data.best_fit import fewest_rows
from mdseq.data.corpus import Corpus
from mdseq.errors import UserError

# Documents that are packed together: enough for rows without padding, few enough to be near each other on the disk.
PACKING_WINDOW = 2**16
# Rows that are looked at to describe a plan whose numbers would otherwise take a walk through all documents.
REPORT_ROWS = 512


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents that fill some rows, row after row; int64 [p] each.

    Attributes:
        row: Index of the piece's row among the rows that were asked for, ascending.
        document: Its document.
        start: Index within the document of its first token.
        length: Its tokens.
        position: Its first token's position in the corpus' stream of tokens.
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def select(self, chosen: slice | np.ndarray) -> Pieces:
        return Pieces(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class PackingReport:
    """What a plan makes of its documents.

    Attributes:
        num_rows: Rows.
        padding_fraction: Share of all slots that hold no token.
        cut_fraction: Share of the documents that are spread over several rows.
        documents_per_row: Documents, or pieces of them, in a row, on average.
    """

    num_rows: int
    padding_fraction: float
    cut_fraction: float
    documents_per_row: float

    def __str__(self) -> str:
        return (
            f"{self.num_rows:,} rows, {self.padding_fraction:.2%} padding, "
            f"{self.documents_per_row:.1f} documents a row, {self.cut_fraction:.1%} of the documents cut"
        )


class Packing(Protocol):
    """A plan: `num_rows` rows of at most `row_length` tokens; every token of its documents is in exactly one."""

    num_rows: int

    def pieces(self, rows: np.ndarray) -> Pieces:
        """What `rows`, int64 [n], hold."""


class DocumentPacking(Packing, Protocol):
    """A plan made of documents, rather than of other plans."""

    def report(self) -> PackingReport:
        """What it makes of the documents."""


class SplitPacking:
    """Concatenate the documents and cut every `row_length` tokens: only the last row has padding."""

    def __init__(self, corpus: Corpus, row_length: int, documents: range | None = None) -> None:
        self._corpus = corpus
        self._row_length = row_length
        self._documents = range(corpus.num_documents) if documents is None else documents
        self._first_token, self._end_token = _stretch(corpus, self._documents)
        self.num_rows = -(-(self._end_token - self._first_token) // row_length)

    def pieces(self, rows: np.ndarray) -> Pieces:
        row_begins = self._first_token + rows * self._row_length
        row_ends = np.minimum(row_begins + self._row_length, self._end_token)
        first_documents, _ = self._corpus.locate(row_begins)
        last_documents, _ = self._corpus.locate(row_ends - 1)
        row, document = _ranges(first_documents, last_documents + 1)
        begins, ends = self._corpus.extents(document)
        position = np.maximum(begins, row_begins[row])
        return Pieces(row, document, position - begins, np.minimum(ends, row_ends[row]) - position, position)

    def report(self) -> PackingReport:
        """Padding is exact; the other two are those of REPORT_ROWS rows spread evenly."""
        rows = np.unique(np.linspace(0, self.num_rows - 1, REPORT_ROWS).astype(np.int64))
        pieces = self.pieces(rows)
        begins, ends = self._corpus.extents(pieces.document)
        starting = pieces.start == 0  # each document is counted where it starts
        cut = starting & (pieces.length < ends - begins)
        return PackingReport(
            self.num_rows,
            1 - (self._end_token - self._first_token) / (self.num_rows * self._row_length),
            float(cut.sum() / max(1, starting.sum())),
            len(pieces) / len(rows),
        )


class WholePacking:
    """Fill rows with whole documents, at most `max_documents_per_row` in each; cut none.

    Each PACKING_WINDOW of consecutive documents is packed on its own, so a row's documents are near each other. The
    plan takes two bytes a document and eight a row; to make it, the lengths of all documents are read once.

    Raises:
        UserError: A document does not fit in a row.
    """

    def __init__(
        self, corpus: Corpus, row_length: int, max_documents_per_row: int, documents: range | None = None
    ) -> None:
        self._corpus = corpus
        self._row_length = row_length
        self._documents = range(corpus.num_documents) if documents is None else documents
        order, sizes = [], []
        too_long, longest, self._num_tokens = 0, 0, 0
        for window in _windows(self._documents):
            begins, ends = corpus.extents(np.arange(window.start, window.stop))
            lengths = ends - begins
            self._num_tokens += int(lengths.sum())
            too_long += int(np.count_nonzero(lengths > row_length))
            longest = max(longest, int(lengths.max()))
            if not too_long:
                window_order, window_sizes = fewest_rows(lengths, row_length, max_documents_per_row)
                order.append(window_order.astype(np.uint16))
                sizes.append(window_sizes)
        if too_long:
            raise UserError(
                f"{too_long:,} of {len(self._documents):,} documents are longer than data.row_length = "
                f"{row_length:,} tokens (the longest has {longest:,}), and whole documents are never cut: "
                "raise data.row_length to at least that, or build the dataset without them"
            )
        self._order = np.concatenate(order)
        self._row_edges = np.concatenate([[0], *sizes]).cumsum()
        self.num_rows = len(self._row_edges) - 1

    def pieces(self, rows: np.ndarray) -> Pieces:
        row, place = _ranges(self._row_edges[rows], self._row_edges[rows + 1])
        window = place // PACKING_WINDOW
        document = self._documents.start + window * PACKING_WINDOW + self._order[place]
        begins, ends = self._corpus.extents(document)
        return Pieces(row, document, np.zeros_like(begins), ends - begins, begins)

    def report(self) -> PackingReport:
        return PackingReport(
            self.num_rows,
            1 - self._num_tokens / (self.num_rows * self._row_length),
            0.0,
            len(self._documents) / self.num_rows,
        )


class JoinedPacking:
    """The rows of several plans, one plan after another."""

    def __init__(self, parts: Sequence[Packing]) -> None:
        self._parts = parts
        self._edges = np.cumsum([0, *(part.num_rows for part in parts)])
        self.num_rows = int(self._edges[-1])

    def pieces(self, rows: np.ndarray) -> Pieces:
        part_of_row = np.searchsorted(self._edges, rows, side="right") - 1
        found = []
        for part in np.unique(part_of_row):
            (chosen,) = np.nonzero(part_of_row == part)
            pieces = self._parts[part].pieces(rows[chosen] - self._edges[part])
            found.append(replace(pieces, row=chosen[pieces.row]))
        joined = Pieces(
            *(np.concatenate([getattr(pieces, field.name) for pieces in found]) for field in fields(Pieces))
        )
        return joined.select(np.argsort(joined.row, kind="stable"))


def _stretch(corpus: Corpus, documents: range) -> tuple[int, int]:
    """Where consecutive documents begin and end in the stream of tokens."""
    begins, ends = corpus.extents(np.array([documents[0], documents[-1]]))
    return int(begins[0]), int(ends[1])


def _windows(documents: range) -> Iterator[range]:
    for first in range(0, len(documents), PACKING_WINDOW):
        yield documents[first : first + PACKING_WINDOW]


def _ranges(firsts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of several ranges, one range after another: the range that each is in, and the numbers."""
    counts = stops - firsts
    index = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return index, np.arange(len(index)) - before[index] + firsts[index]
