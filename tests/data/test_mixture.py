"""A mixture gives each source its share, exactly and without memory."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.mixture import MixedOrder, mixture_shares
from mdseq.data.order import RowOrder
from mdseq.errors import UserError

weights_of_sources = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def shares_of(weights: list[int]) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


@given(weights_of_sources, st.integers(0, 10**9))
def test_after_whole_blocks_each_source_has_its_share(weights: list[int], block: int) -> None:
    shares = shares_of(weights)
    mixture = MixedOrder([7] * len(shares), shares, seed=0)
    taken = [mixture.taken(count) for count in range(block, block + 4)]
    for count, sums in zip(range(block, block + 4), taken, strict=True):
        assert sums.sum() == count * mixture.block
        for total, share in zip(sums.tolist(), shares, strict=True):
            assert abs(total - count * mixture.block * share) < 1
    assert np.all(np.diff(taken, axis=0) >= 0)


@given(weights_of_sources, st.integers(0, 2**32 - 1))
def test_samples_are_counted_as_if_one_after_another(weights: list[int], seed: int) -> None:
    """Over a few blocks, sources appear as often as `taken` says, and each counts its own samples without a gap."""
    mixture = MixedOrder([7] * len(weights), shares_of(weights), seed)
    sources, indices = mixture.sources_of(np.arange(3 * mixture.block))
    for source in range(len(weights)):
        for count in range(4):
            before = slice(0, count * mixture.block)
            found = np.sort(indices[before][sources[before] == source])
            np.testing.assert_array_equal(found, np.arange(mixture.taken(count)[source]))


def test_a_source_too_small_for_a_block_makes_the_blocks_larger() -> None:
    mixture = MixedOrder([7, 7], shares_of([1, 9_999]), seed=0)
    assert mixture.block == 20_000
    assert mixture.taken(3).tolist() == [6, 59_994]


@given(st.integers(0, 30), st.integers(1, 700))
def test_steps_are_stretches_of_one_stream_whatever_their_size(step: int, batch_size: int) -> None:
    mixture = MixedOrder([50, 300, 4], shares_of([2, 5, 1]), seed=5, window=64)
    whole = mixture.rows(0, (step + 1) * batch_size)
    np.testing.assert_array_equal(mixture.rows(step, batch_size), whole[step * batch_size :])


def test_every_source_has_its_own_rows_order_and_epochs() -> None:
    num_rows = [50, 300]
    mixture = MixedOrder(num_rows, shares_of([1, 1]), seed=5, window=64)
    samples = np.arange(4 * mixture.block)
    rows, (sources, indices) = mixture.rows(0, len(samples)), mixture.sources_of(samples)
    for source, first_row in enumerate([0, 50]):
        chosen = sources == source
        own = rows[chosen][np.argsort(indices[chosen])] - first_row
        np.testing.assert_array_equal(own, RowOrder(num_rows[source], 5 + source, window=64).rows(0, len(own)))


def test_sources_are_spread_within_a_block() -> None:
    mixture = MixedOrder([50, 300], shares_of([1, 3]), seed=5)
    sources, _ = mixture.sources_of(np.arange(1024))
    by_quarter = sources.reshape(4, 256).mean(axis=1)
    assert np.all((by_quarter > 0.65) & (by_quarter < 0.85))


def test_the_mixture_is_pinned() -> None:
    """A run that resumes with a later release must see the rows it would have seen."""
    assert MixedOrder([10, 20], shares_of([1, 3]), seed=0).rows(0, 8).tolist() == [10, 10, 19, 18, 22, 24, 25, 25]


def test_weights_come_from_the_dataset_or_the_run(corpus_of: Any) -> None:
    plain = corpus_of([5] * 6, documents_per_source=2)
    weighted = corpus_of([5] * 6, documents_per_source=2, weights={"a": 1.0, "b": 0.5, "c": 2.5})
    assert mixture_shares(plain, {}) == {}
    assert mixture_shares(weighted, {}) == {"a": Fraction(1, 4), "b": Fraction(1, 8), "c": Fraction(5, 8)}
    for corpus in (plain, weighted):
        assert mixture_shares(corpus, {"c": 3, "a": 1, "b": 0}) == {"a": Fraction(1, 4), "c": Fraction(3, 4)}


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"a": 1, "b": 1}, r"data.mixture: no weight for c; .*0 to leave it out: a, b, c"),
        ({"a": 1, "b": 1, "d": 1}, r"there is no text of d to read; no weight for c; .*: a, b, c"),
        ({"a": 0, "b": 0, "c": 0}, r"all weights are 0"),
    ],
)
def test_weights_must_name_the_sources(corpus_of: Any, weights: dict[str, float], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        mixture_shares(corpus_of([5] * 6, documents_per_source=2), weights)
