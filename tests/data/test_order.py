"""The order of rows is a shuffle that needs no memory of earlier steps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.order import BLOCKS_PER_WINDOW, RowOrder, permuted

seeds = st.integers(-(2**63), 2**64)
windows = st.integers(1, 400)


@given(st.integers(1, 300), seeds, windows, st.integers(0, 1000))
def test_every_epoch_visits_every_row_once(num_rows: int, seed: int, window: int, epoch: int) -> None:
    rows = RowOrder(num_rows, seed, window).rows(step=epoch, batch_size=num_rows)
    np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))


@given(st.integers(1, 50), seeds, windows, st.integers(1, 20))
def test_batches_are_consecutive_stretches_of_one_stream(
    num_rows: int, seed: int, window: int, batch_size: int
) -> None:
    order = RowOrder(num_rows, seed, window)
    stream = np.concatenate([order.rows(step, batch_size) for step in range(6)])
    np.testing.assert_array_equal(stream, order.rows(0, 6 * batch_size))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**64 - 1))
def test_permutations_of_different_sizes_side_by_side(sizes: list[int], key: int) -> None:
    indices = np.concatenate([np.arange(size) for size in sizes])
    limits = np.repeat(sizes, sizes)
    together = permuted(indices, limits, np.full(len(indices), key, dtype=np.uint64))
    for part in np.split(together, np.cumsum(sizes)[:-1]):
        np.testing.assert_array_equal(np.sort(part), np.arange(len(part)))


@pytest.mark.parametrize("num_rows", [64 * 640, 64 * 640 + 5, 64 * 640 + 345])
def test_a_window_of_samples_reads_few_places(num_rows: int) -> None:
    """Rows of a window come in blocks of neighbours, from all over the corpus."""
    window, block = 640, 640 // BLOCKS_PER_WINDOW
    order = RowOrder(num_rows, seed=4, window=window)
    for index in range(4):
        rows = np.sort(order.rows(index, window))
        # A window may begin and end within a block, where the short last block has shifted the others.
        assert len(np.unique(rows // block)) <= BLOCKS_PER_WINDOW + 2
        assert rows[0] < num_rows * 0.1
        assert rows[-1] > num_rows * 0.9


@pytest.mark.parametrize("window", [64, 1000, 5000])
def test_epochs_seeds_and_windows_differ(window: int) -> None:
    first = RowOrder(1000, seed=0, window=window).rows(0, 1000)
    assert np.mean(first == RowOrder(1000, seed=0, window=window).rows(1, 1000)) < 0.02
    assert np.mean(first == RowOrder(1000, seed=1, window=window).rows(0, 1000)) < 0.02
    within = RowOrder(64 * 100, seed=0, window=64 * 50).rows(0, 64 * 100) % 50  # places in blocks of 50
    assert np.mean(within[: 64 * 50] == within[64 * 50 :]) < 0.04


@pytest.mark.parametrize(("num_rows", "window"), [(10, 16), (10, 3), (100, 64)])
def test_shuffle_is_even(num_rows: int, window: int) -> None:
    """Over many epochs, each row comes first about equally often (chi-squared, five standard deviations)."""
    num_epochs, freedom = 500 * num_rows, num_rows - 1
    order = RowOrder(num_rows, seed=3, window=window)
    firsts = order.rows_of(np.arange(num_epochs) * num_rows)
    expected = num_epochs / num_rows
    statistic = np.sum((np.bincount(firsts, minlength=num_rows) - expected) ** 2 / expected)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("window", [640, 4096])
def test_neighbours_are_not_kept_together(window: int) -> None:
    rows = RowOrder(4096, seed=0, window=window).rows(0, 4096)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.06


def test_the_order_is_pinned() -> None:
    """A run that resumes with a later release must see the rows it would have seen."""
    assert RowOrder(10, seed=0).rows(0, 10).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]
    assert RowOrder(10, seed=0, window=10).rows(0, 10).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]
    assert RowOrder(300, seed=0, window=128).rows(0, 8).tolist() == [130, 235, 128, 135, 117, 252, 183, 102]


def test_sequence_without_shuffle() -> None:
    assert RowOrder(5, seed=0, shuffle=False).rows(1, 4).tolist() == [4, 0, 1, 2]


def test_a_far_step_costs_no_more_than_the_first() -> None:
    order = RowOrder(10**9 + 7, seed=0)
    started = time.perf_counter()
    rows = order.rows(10**8, 512)
    assert time.perf_counter() - started < 0.5
    assert 0 <= rows.min() <= rows.max() < order.num_rows
