"""The colours of confidence, on the page and in pictures alike.

From orange, unsure, to a quiet blue, sure: what draws the eye is what may still change. The steps are even in OKLab,
and lightness goes one way through all of them, so the scale can be read in grey and with any colour blindness.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_LEVELS = 10


@dataclass(frozen=True)
class Palette:
    """One mode of display.

    Attributes:
        levels: Background of a token, from unsure to sure; `ink` is read on each of them.
        ink: Text, and the line under what has changed.
        faint: Text beside the main thing.
        rule: Thin lines.
        paper: Background.
        raised: Background of what lies above the paper.
        accent: What can be moved.
    """

    levels: tuple[str, ...]
    ink: str
    faint: str
    rule: str
    paper: str
    raised: str
    accent: str


LIGHT = Palette(
    levels=(
        "#f39e4c", "#f1a764", "#eeb07a", "#ecb98e", "#e8c2a1", "#e5cab3", "#e1d2c5", "#dddad7", "#d8e2e9", "#d3eafb",
    ),
    ink="#1c1b19",
    faint="#66635c",
    rule="#dcd9d2",
    paper="#fffefb",
    raised="#ffffff",
    accent="#1f5f99",
)  # fmt: skip
DARK = Palette(
    levels=(
        "#9f5618", "#915427", "#825131", "#744e39", "#664b3f", "#584844", "#494448", "#3b404c", "#2b3b4f", "#1a3652",
    ),
    ink="#f1efea",
    faint="#a5a29b",
    rule="#383b42",
    paper="#15171b",
    raised="#1f2228",
    accent="#8cc0ee",
)  # fmt: skip


def level_of(percent: int) -> int:
    """The step of the scale, from 0 to NUM_LEVELS - 1, of a confidence in whole percent."""
    return min(percent * NUM_LEVELS // 100, NUM_LEVELS - 1)
