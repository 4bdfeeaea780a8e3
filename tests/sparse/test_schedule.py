"""A short description gives every layer its pattern."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.sparse import Pattern
from mdseq.sparse.schedule import layer_patterns


def dilations(*arguments, **options) -> list[tuple[int, ...]]:
    return [pattern.dilations for pattern in layer_patterns(*arguments, **options)]


def test_entries_repeat() -> None:
    assert dilations(6, 8, [1, 1, 2, 4]) == [(1,), (1,), (2,), (4,), (1,), (1,)]
    assert dilations(3, 8, [1, [1, 4]]) == [(1,), (1, 4), (1,)]
    assert layer_patterns(1, 8, [3]) == (Pattern(8, (3,)),)


@pytest.mark.parametrize(
    ("num_layers", "entries", "expected"),
    [
        (4, [1, 8], [1, 2, 4, 8]),
        (4, [8, 1], [8, 4, 2, 1]),
        (7, [1, 8], [1, 1, 2, 2, 4, 4, 8]),  # 1.4, 2.8 and 5.7 stand in the middle: the smaller
        (5, [1, 4, 1], [1, 2, 4, 2, 1]),
        (3, [1, 9], [1, 3, 9]),
        (3, [2, 9], [2, 3, 9]),  # a divisor of 18 near 4.2
        (3, [1, 7], [1, 1, 7]),  # no divisor of 7 stands between
        (4, [5], [5, 5, 5, 5]),
        (1, [2, 8], [2]),
        (2, [1, 2, 3, 4], [1, 4]),
    ],
)
def test_entries_are_spread_over_the_layers(num_layers: int, entries: list[int], expected: list[int]) -> None:
    assert dilations(num_layers, 8, entries, "interpolate") == [(dilation,) for dilation in expected]


def test_every_group_of_heads_is_interpolated() -> None:
    assert dilations(3, 8, [[1, 1], [1, 16]], "interpolate") == [(1, 1), (1, 4), (1, 16)]


@given(st.integers(2, 20), st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_interpolation_adds_nothing_to_the_stride(num_layers: int, entries: list[int]) -> None:
    found = [dilation for (dilation,) in dilations(num_layers, 8, entries, "interpolate")]
    assert (found[0], found[-1]) == (entries[0], entries[-1])
    assert math.lcm(*entries) % math.lcm(*found) == 0
    assert min(entries) <= min(found) <= max(found) <= max(entries)


def test_every_nth_layer_sees_the_whole_document() -> None:
    patterns = layer_patterns(7, 8, [1, 2], full_every=3)
    assert [pattern.window for pattern in patterns] == [8, 8, None, 8, 8, None, 8]
    assert [pattern.dilations for pattern in patterns if pattern.window] == [(1,), (2,), (2,), (1,), (1,)]
    assert layer_patterns(2, 8, [1], full_every=1) == (Pattern(None), Pattern(None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, [1]), "num_layers = 0"),
        ((2, 8, [1], "repeat", -1), "full_every = -1"),
        ((2, 8, []), "dilation is empty"),
        ((2, 8, [1], "random"), "schedule = 'random'; give one of repeat, interpolate"),
        ((2, 8, [1, [1, 2]], "interpolate"), "as many groups of heads"),
        ((2, 0, [1]), "window = 0"),
        ((2, 8, [1, 0]), "dilations = "),
        ((2, 8, [1, [2, 0]]), "dilations = "),
    ],
)
def test_what_cannot_be(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_patterns(*arguments)
