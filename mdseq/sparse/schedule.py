"""A pattern for each layer, from a short description: the dilations over depth, and which layers see everything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mdseq.sparse.pattern import Pattern

SCHEDULES = ("repeat", "interpolate")


def layer_patterns(
    num_layers: int,
    window: int,
    dilation: Sequence[int | Sequence[int]],
    schedule: str = "repeat",
    full_every: int = 0,
) -> tuple[Pattern, ...]:
    """The patterns of all layers.

    With "repeat", layer i takes entry i modulo the length. With "interpolate", the first entry falls on the first
    layer, the last on the last, the others evenly between; a layer between two entries takes the divisor of their
    least common multiple that is nearest, by ratio, to where it stands between them: 1 and 8 give 1, 2, 4, 8. So each
    gap is a multiple of smaller ones, and what a layer brings together the next can carry on. With fewer layers than
    entries, some entries are not used.

    Args:
        num_layers: Layers, at least one.
        window: Keys per side.
        dilation: Gaps between the keys, in the order of the layers; an entry that is a sequence gives one to each of
            as many equal groups of heads.
        schedule: "repeat" or "interpolate".
        full_every: Every n-th layer, counted from 1, sees the whole document instead; 0 for none.

    Raises:
        ValueError: For values outside of these, or entries of different numbers of groups to interpolate between.
    """
    entries = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in dilation]
    if num_layers < 1 or full_every < 0:
        raise ValueError(f"num_layers = {num_layers}, full_every = {full_every}; give at least 1 and 0")
    if not entries:
        raise ValueError("dilation is empty; give at least one entry")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r}; give one of {', '.join(SCHEDULES)}")
    given = [Pattern(window, entry) for entry in entries]
    if schedule == "interpolate":
        given = [Pattern(window, dilations) for dilations in _interpolated(entries, num_layers)]
    return tuple(
        Pattern(None) if full_every and (i + 1) % full_every == 0 else given[i % len(given)] for i in range(num_layers)
    )


def _interpolated(entries: Sequence[tuple[int, ...]], num_layers: int) -> list[tuple[int, ...]]:
    if len({len(entry) for entry in entries}) > 1:
        raise ValueError(f"dilation = {list(entries)}; give all entries as many groups of heads to go between them")
    layers = []
    for i in range(num_layers):
        place = i * (len(entries) - 1) / max(num_layers - 1, 1)
        before = min(int(place), len(entries) - 1)
        after = min(before + 1, len(entries) - 1)
        pairs = zip(entries[before], entries[after], strict=True)
        layers.append(tuple(_between(first, second, place - before) for first, second in pairs))
    return layers


def _between(first: int, second: int, fraction: float) -> int:
    """The divisor of lcm(first, second) nearest to first^(1 - fraction) second^fraction; the smaller of two."""
    goal = (1 - fraction) * math.log(first) + fraction * math.log(second)
    multiple = math.lcm(first, second)
    allowed = [d for d in range(min(first, second), max(first, second) + 1) if multiple % d == 0]
    return min(allowed, key=lambda d: round(abs(math.log(d) - goal), 9))
