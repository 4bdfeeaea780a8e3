"""All plans put every token of every document in exactly one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data import packing as packing_module
from mdseq.data.corpus import Corpus
from mdseq.data.packing import JoinedPacking, Packing, SplitPacking, WholePacking
from mdseq.errors import UserError

lengths_of_documents = st.lists(st.integers(2, 12), min_size=1, max_size=30)


def laid_out(packing: Packing, corpus: Corpus) -> list[list[tuple[int, int]]]:
    """(document, position in it) of every token, by row; asks for the rows in another order than they come."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(packing.num_rows)]
    asked = np.arange(packing.num_rows)[::-1]
    pieces = packing.pieces(asked)
    assert np.all(np.diff(pieces.row) >= 0)
    for piece in range(len(pieces)):
        document, start, length = (int(x[piece]) for x in (pieces.document, pieces.start, pieces.length))
        assert length > 0
        begin, _ = corpus.extents(np.array([document]))
        assert pieces.position[piece] == begin[0] + start
        rows[asked[pieces.row[piece]]] += [(document, start + offset) for offset in range(length)]
    return rows


def flat(rows: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [token for row in rows for token in row]


def stream(lengths: list[int], documents: range) -> list[tuple[int, int]]:
    return [(document, position) for document in documents for position in range(lengths[document])]


@given(lengths_of_documents, st.integers(1, 40), st.data())
def test_split_packing_is_the_corpus_cut_into_full_rows(
    corpus_of: Any, lengths: list[int], row_length: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(lengths) - 1))
    documents = range(first, data.draw(st.integers(first + 1, len(lengths))))
    corpus = corpus_of(lengths)
    packing = SplitPacking(corpus, row_length, documents)
    rows = laid_out(packing, corpus)
    assert flat(rows) == stream(lengths, documents)
    assert all(len(row) == row_length for row in rows[:-1])
    assert 0 < len(rows[-1]) <= row_length

    report = packing.report()
    rows_of_document = {d: {index for index, row in enumerate(rows) if d in dict(row)} for d in documents}
    assert report.num_rows == len(rows)
    assert report.padding_fraction == pytest.approx((row_length - len(rows[-1])) / (len(rows) * row_length))
    assert report.documents_per_row == pytest.approx(sum(map(len, rows_of_document.values())) / len(rows))
    assert report.cut_fraction == pytest.approx(np.mean([len(held) > 1 for held in rows_of_document.values()]))


@given(lengths_of_documents, st.integers(12, 40), st.integers(1, 5), st.data())
def test_whole_packing_never_cuts(
    corpus_of: Any, lengths: list[int], row_length: int, most: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(lengths) - 1))
    documents = range(first, data.draw(st.integers(first + 1, len(lengths))))
    corpus = corpus_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "PACKING_WINDOW", 7)
        packing = WholePacking(corpus, row_length, most, documents)
        rows = laid_out(packing, corpus)
    assert sorted(flat(rows)) == stream(lengths, documents)
    for row in rows:
        held = sorted({document for document, _ in row})
        assert row == [(document, position) for document in held for position in range(lengths[document])]
        assert 1 <= len(held) <= most
        assert len(row) <= row_length
        assert (held[0] - first) // 7 == (held[-1] - first) // 7, "a row stays within its window"
    report = packing.report()
    assert report.padding_fraction == pytest.approx(1 - sum(map(len, rows)) / (len(rows) * row_length))
    assert (report.num_rows, report.cut_fraction) == (len(rows), 0.0)
    assert report.documents_per_row == pytest.approx(len(documents) / len(rows))


def test_whole_packing_refuses_documents_that_do_not_fit(corpus_of: Any) -> None:
    with pytest.raises(UserError, match=r"2 of 3 documents .* data.row_length = 8 .*longest has 12"):
        WholePacking(corpus_of([9, 3, 12]), row_length=8, max_documents_per_row=4)


def test_joined_packings_keep_their_rows(corpus_of: Any) -> None:
    lengths = [5, 9, 3, 12, 4, 6, 2]
    corpus = corpus_of(lengths)
    parts = [
        SplitPacking(corpus, 4, range(3)),
        WholePacking(corpus, 16, 2, range(3, 5)),
        SplitPacking(corpus, 8, range(5, 7)),
    ]
    joined = JoinedPacking(parts)
    assert laid_out(joined, corpus) == [row for part in parts for row in laid_out(part, corpus)]


def test_a_report_reads_as_a_line(corpus_of: Any) -> None:
    report = SplitPacking(corpus_of([10, 10, 10, 7]), row_length=20).report()
    assert str(report) == "2 rows, 7.50% padding, 2.0 documents a row, 0.0% of the documents cut"
