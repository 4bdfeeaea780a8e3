"""Best fit over a histogram is best fit document by document, and leaves little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.best_fit import best_fit_decreasing, fewest_rows, next_fit


def spaces_one_by_one(lengths: list[int], row_length: int, most: int) -> list[tuple[int, int]]:
    """(tokens, documents) in each row of plain best-fit decreasing, which looks at every row for every document."""
    rows: list[list[int]] = []  # space, places
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if row[0] >= length and row[1] > 0]
        if not fitting:
            fitting = [[row_length, most]]
            rows += fitting
        best = min(fitting)
        best[0] -= length
        best[1] -= 1
    return sorted((row_length - space, most - places) for space, places in rows)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 60), st.integers(1, 6))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], row_length: int, most: int) -> None:
    documents, sizes = best_fit_decreasing(np.array(lengths, dtype=np.int64), row_length, most)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    rows = [row.tolist() for row in np.split(documents, np.cumsum(sizes)[:-1])] if lengths else []
    filled = sorted((sum(lengths[document] for document in row), len(row)) for row in rows)
    assert filled == spaces_one_by_one(lengths, row_length, most)
    assert all(row == sorted(row) for row in rows)
    assert rows == sorted(rows)


def test_a_row_is_filled_to_the_last_slot_where_it_can_be() -> None:
    """The longest first: 7 + 3, 6 + 4, 5 + 5; document by document, in their order, four rows would be needed."""
    documents, sizes = best_fit_decreasing(np.array([3, 5, 6, 7, 5, 4]), row_length=10, max_documents_per_row=4)
    assert documents.tolist() == [0, 3, 1, 4, 2, 5]
    assert sizes.tolist() == [2, 2, 2]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 60), st.integers(1, 6))
def test_next_fit_takes_documents_as_they_come(lengths: list[int], row_length: int, most: int) -> None:
    rows: list[list[int]] = []
    for document, length in enumerate(lengths):
        if not rows or len(rows[-1]) == most or sum(lengths[d] for d in rows[-1]) + length > row_length:
            rows.append([])
        rows[-1].append(document)
    documents, sizes = next_fit(np.array(lengths, dtype=np.int64), row_length, most)
    assert documents.tolist() == list(range(len(lengths)))
    assert sizes.tolist() == [len(row) for row in rows]


# Shapes of real pairs: verses of a sentence or two; questions with short and with long contexts.
# The last is bound by the number of documents in a row, not by its tokens.
@pytest.mark.parametrize(
    ("median", "spread", "row_length"), [(70, 0.45, 512), (150, 0.6, 1024), (1200, 0.35, 4096), (65, 0.45, 4096)]
)
def test_padding_of_pairs_is_under_five_percent(median: int, spread: float, row_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 30_000).astype(np.int64)
    lengths = np.clip(lengths, 4, row_length)
    _, sizes = fewest_rows(lengths, row_length, max_documents_per_row=64)
    assert 1 - lengths.sum() / (len(sizes) * row_length) < 0.05
