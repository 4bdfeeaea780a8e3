"""Which links between ranks to measure, and when, so that no rank is in two at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.figures import LINK_BETWEEN_NODES, LINK_WITHIN_NODE


@dataclass(frozen=True)
class Link:
    """Two ranks that exchange data while, in the same turn, others do.

    Attributes:
        figure: What its rate is called; `rank` reports it.
        turn: Links of one turn share no rank.
    """

    figure: str
    rank: int
    peer: int
    turn: int


def links_of(nodes: Sequence[str]) -> list[Link]:
    """From each rank to the next one on its node, and to the one with the same place on the next node; by turn.

    Args:
        nodes: Each rank's node.
    """
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
    most = max(map(len, ranks_on.values()))
    in_same_place = [[ranks[place] for ranks in ranks_on.values() if place < len(ranks)] for place in range(most)]
    found = [link for ring in ranks_on.values() for link in _ring(LINK_WITHIN_NODE, ring, first_turn=0)]
    found += [link for ring in in_same_place for link in _ring(LINK_BETWEEN_NODES, ring, first_turn=3)]
    return sorted(found, key=lambda link: link.turn)


def _ring(figure: str, ranks: Sequence[int], first_turn: int) -> Iterator[Link]:
    """Every second link has the same turn; the last one of an odd ring would meet the first."""
    num = len(ranks)
    if num == 1:
        return
    for place, rank in enumerate(ranks):
        turn = 2 if num % 2 and place == num - 1 else place % 2
        yield Link(figure, rank, ranks[(place + 1) % num], first_turn + turn)
