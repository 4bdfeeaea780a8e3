"""Whole documents into few rows: best-fit decreasing, over a histogram of their lengths.

Documents are taken from the longest to the shortest, and each goes into the fullest row that still has room for it.
Documents of one length are handled together, and so are rows that are filled alike, so the work grows with the number
of different lengths rather than of documents (histogram packing: Krell et al., "Efficient Sequence Packing without
Cross-contamination", 2021).

Where rows may hold fewer documents than they have room for, that leaves the short ones to rows of their own, which stay
half empty. Then taking the documents as they come is better, and such short ones leave little padding that way.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class _Pack:
    """Rows that are filled alike.

    Attributes:
        space: Tokens that each still has room for.
        places: Documents that each may still take.
        count: How many such rows there are.
        contents: (length, how many documents of it) in each of the rows, longest first.
    """

    space: int
    places: int
    count: int
    contents: tuple[tuple[int, int], ...] = ()

    @property
    def tightness(self) -> tuple[int, int]:
        return self.space, self.places


def fewest_rows(lengths: np.ndarray, row_length: int, max_documents_per_row: int) -> tuple[np.ndarray, np.ndarray]:
    """The better of best fit and next fit; see `best_fit_decreasing` for what is given and returned."""
    best = best_fit_decreasing(lengths, row_length, max_documents_per_row)
    following = next_fit(lengths, row_length, max_documents_per_row)
    return best if len(best[1]) <= len(following[1]) else following


def best_fit_decreasing(
    lengths: np.ndarray, row_length: int, max_documents_per_row: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents of the given lengths, each at least 1 and at most `row_length`.

    Returns:
        The indices of the documents, row after row, int64 [documents], and how many of them each row holds, int64
        [rows]. Within a row documents keep their order, and rows are ordered by their first document.
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= row_length)
    values, counts = np.unique(lengths, return_counts=True)
    packs = _fill(values.tolist(), counts.tolist(), row_length, max_documents_per_row)

    # Hand the documents of each length out to the rows that want them, in their order.
    by_length = np.argsort(lengths, kind="stable")
    next_of = dict(zip(values.tolist(), np.cumsum(counts) - counts, strict=True))
    rows = []
    for pack in packs:
        columns = []
        for length, documents_per_row in pack.contents:
            first = next_of[length]
            next_of[length] = last = first + pack.count * documents_per_row
            columns.append(by_length[first:last].reshape(pack.count, documents_per_row))
        rows += list(np.sort(np.concatenate(columns, axis=1), axis=1))
    rows.sort(key=lambda row: int(row[0]))
    documents = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return documents, np.array([len(row) for row in rows], dtype=np.int64)


def next_fit(lengths: np.ndarray, row_length: int, max_documents_per_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in their order, in a new row where the next one does not fit; as `best_fit_decreasing`."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    firsts = [0]
    while firsts[-1] < len(lengths):
        first = firsts[-1]
        fitting = int(np.searchsorted(edges, edges[first] + row_length, side="right")) - 1
        firsts.append(min(fitting, first + max_documents_per_row))
    return np.arange(len(lengths)), np.diff(firsts)


def _fill(lengths: list[int], counts: list[int], row_length: int, max_documents_per_row: int) -> list[_Pack]:
    """Packs that hold `counts` documents of `lengths`, which ascend."""
    open_packs: list[_Pack] = []  # by tightness
    full_packs: list[_Pack] = []
    for length, count in zip(reversed(lengths), reversed(counts), strict=True):
        while count:
            index = bisect_left(open_packs, (length, 0), key=lambda pack: pack.tightness)
            if index < len(open_packs):
                pack = open_packs.pop(index)
            else:
                pack = _Pack(row_length, max_documents_per_row, count)
            # A row that has taken a document is tighter than before: it is the best fit for the next one, too.
            documents_per_row = min(pack.space // length, pack.places, count)
            num_rows = min(pack.count, count // documents_per_row)
            if pack.contents and num_rows < pack.count:
                rest = _Pack(pack.space, pack.places, pack.count - num_rows, pack.contents)
                insort(open_packs, rest, key=lambda pack: pack.tightness)
            count -= num_rows * documents_per_row
            filled = _Pack(
                pack.space - documents_per_row * length,
                pack.places - documents_per_row,
                num_rows,
                (*pack.contents, (length, documents_per_row)),
            )
            if filled.places and filled.space >= lengths[0]:
                insort(open_packs, filled, key=lambda pack: pack.tightness)
            else:
                full_packs.append(filled)
    return full_packs + open_packs
