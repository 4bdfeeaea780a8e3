"""The order of rows is a shuffle that needs no memory of earlier steps."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.order import RowOrder

seeds = st.integers(-(2**63), 2**64)


@given(st.integers(1, 300), seeds, st.integers(0, 1000))
def test_every_epoch_visits_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    rows = RowOrder(num_rows, seed).rows(step=epoch, batch_size=num_rows)
    np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))


@given(st.integers(1, 50), seeds, st.integers(1, 20))
def test_batches_are_consecutive_stretches_of_one_stream(num_rows: int, seed: int, batch_size: int) -> None:
    order = RowOrder(num_rows, seed)
    stream = np.concatenate([order.rows(step, batch_size) for step in range(6)])
    np.testing.assert_array_equal(stream, order.rows(0, 6 * batch_size))


def test_seeds_and_epochs_differ() -> None:
    first = RowOrder(1000, seed=0).rows(0, 1000)
    assert np.mean(first == RowOrder(1000, seed=0).rows(1, 1000)) < 0.02
    assert np.mean(first == RowOrder(1000, seed=1).rows(0, 1000)) < 0.02


def test_shuffle_is_even() -> None:
    """Over many epochs, each row comes first about equally often (chi-squared, 9 degrees of freedom)."""
    num_epochs = 5000
    firsts = RowOrder(10, seed=3).rows(0, 10 * num_epochs).reshape(num_epochs, 10)[:, 0]
    expected = num_epochs / 10
    assert np.sum((np.bincount(firsts, minlength=10) - expected) ** 2 / expected) < 30


def test_neighbours_are_not_kept_together() -> None:
    rows = RowOrder(4096, seed=0).rows(0, 4096)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.06


def test_the_order_is_pinned() -> None:
    """A run that resumes with a later release must see the rows it would have seen."""
    assert RowOrder(10, seed=0).rows(0, 10).tolist() == [0, 1, 2, 9, 8, 3, 4, 7, 6, 5]


def test_sequence_without_shuffle() -> None:
    assert RowOrder(5, seed=0, shuffle=False).rows(1, 4).tolist() == [4, 0, 1, 2]


def test_a_far_step_costs_no_more_than_the_first() -> None:
    order = RowOrder(10**9 + 7, seed=0)
    started = time.perf_counter()
    rows = order.rows(10**8, 512)
    assert time.perf_counter() - started < 0.5
    assert 0 <= rows.min() <= rows.max() < order.num_rows
