"""Tokens laid out in lines of limited width, for pictures: words stay whole, even those of several tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

NEWLINE = "↵"
EMPTY = "∅"
_TAB = " " * 4
# A newline, other white space, or a word.
_STRETCH = re.compile(r"\n|[^\S\n]+|\S+")


@dataclass(frozen=True)
class Run:
    """Part of a token, on one line.

    Attributes:
        token: Which.
        text: What is drawn; NEWLINE where a line ends because the token says so.
        line: Counted from 0.
        x, width: Where it begins, and how wide it is.
    """

    token: int
    text: str
    line: int
    x: float
    width: float


def lay_out(pieces: Sequence[str], width_of: Callable[[str], float], width: float) -> list[Run]:
    """Break tokens into lines.

    A line ends at a newline, or at white space before a word that does not fit; such white space is not drawn. A word
    wider than a line is broken anywhere.

    Args:
        pieces: Of each token.
        width_of: Width of a text on one line.
        width: Of a line.
    """
    drawn = [_drawable(piece) for piece in pieces]
    owner = [token for token, piece in enumerate(drawn) for _ in piece]
    runs: list[Run] = []
    line, x = 0, 0.0
    for stretch in _STRETCH.finditer("".join(drawn)):
        if stretch.group() == "\n":
            runs.append(Run(owner[stretch.start()], NEWLINE, line, x, width_of(NEWLINE)))
            line, x = line + 1, 0.0
            continue
        # The stretch, cut where one of its tokens ends.
        grouped = groupby(range(*stretch.span()), key=owner.__getitem__)
        parts = [(token, "".join(stretch.string[i] for i in places)) for token, places in grouped]
        if x > 0 and x + sum(width_of(part) for _, part in parts) > width:
            if stretch.group().isspace():
                continue
            line, x = line + 1, 0.0
        for token, part in parts:
            for text in _that_fit(part, width_of, width - x, width):
                text_width = width_of(text)
                if x > 0 and x + text_width > width:
                    line, x = line + 1, 0.0
                runs.append(Run(token, text, line, x, text_width))
                x += text_width
    return runs


def _that_fit(text: str, width_of: Callable[[str], float], room: float, width: float) -> Iterator[str]:
    """A text in parts, of which the first fits into the room left in a line, and the others into lines of their own."""
    while width_of(text) > room and len(text) > 1:
        count = len(text)
        while count > 1 and width_of(text[:count]) > room:
            count -= 1
        yield text[:count]
        text, room = text[count:], width
    yield text


def _drawable(piece: str) -> str:
    """Without characters that cannot be drawn; a font would show other white space as boxes."""
    shown = "".join(
        character if character.isprintable() or character == "\n" else " " if character.isspace() else "\ufffd"
        for character in piece.replace("\t", _TAB)
    )
    return shown or EMPTY
