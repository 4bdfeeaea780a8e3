"""Both plans put every token of every document in exactly one row."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.packing import Packing, SplitPacking, WholePacking
from mdseq.errors import UserError

lengths_of_documents = st.lists(st.integers(2, 12), min_size=1, max_size=30)


def laid_out(packing: Packing) -> list[tuple[int, int]]:
    """(document, position) of every token, row by row."""
    rows = [packing.row(index) for index in range(packing.num_rows)]
    return [(piece.document, position) for row in rows for piece in row for position in range(piece.start, piece.stop)]


def row_sizes(packing: Packing) -> list[int]:
    return [sum(p.stop - p.start for p in packing.row(index)) for index in range(packing.num_rows)]


@given(lengths_of_documents, st.integers(1, 40))
def test_split_packing_is_the_corpus_cut_into_full_rows(corpus_of: Any, lengths: list[int], row_length: int) -> None:
    packing = SplitPacking(corpus_of(lengths), row_length)
    assert laid_out(packing) == [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    *full, last = row_sizes(packing)
    assert all(size == row_length for size in full)
    assert 0 < last <= row_length
    assert packing.padding_fraction == pytest.approx((row_length - last) / (packing.num_rows * row_length))


@given(lengths_of_documents, st.integers(12, 40), st.integers(1, 5))
def test_whole_packing_never_cuts(corpus_of: Any, lengths: list[int], row_length: int, most: int) -> None:
    packing = WholePacking(corpus_of(lengths), row_length, max_documents_per_row=most)
    assert laid_out(packing) == [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    for index in range(packing.num_rows):
        row = packing.row(index)
        assert 1 <= len(row) <= most
        assert all((piece.start, piece.stop) == (0, lengths[piece.document]) for piece in row)
    sizes = row_sizes(packing)
    assert max(sizes) <= row_length
    assert packing.padding_fraction == pytest.approx(1 - sum(sizes) / (len(sizes) * row_length))


def test_whole_packing_fills_a_row_before_the_next(corpus_of: Any) -> None:
    packing = WholePacking(corpus_of([4, 4, 2, 8, 2]), row_length=10, max_documents_per_row=8)
    assert [[piece.document for piece in packing.row(index)] for index in range(2)] == [[0, 1, 2], [3, 4]]


def test_whole_packing_refuses_documents_that_do_not_fit(corpus_of: Any) -> None:
    with pytest.raises(UserError, match=r"2 of 3 documents .* data.row_length = 8 .*longest has 12"):
        WholePacking(corpus_of([9, 3, 12]), row_length=8, max_documents_per_row=4)
