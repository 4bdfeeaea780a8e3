"""Changes of the characters of a text that do not depend on where the text is cut into pieces.

The order matters: removing a character may bring together a CR and its LF, or a letter and its accent.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import Pieces
from data_prep.spec import CleaningSpec

# What has no glyph, of the categories Cc and Cf, but tab, LF and CR, and the two joiners that Persian, Indic scripts
# and emoji are spelled with. The visible ones of Cf (Arabic number signs and the like) are text.
CONTROL_CHARACTERS = (
    (0x00, 0x08), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x061C, 0x061C), (0x180E, 0x180E),
    (0x200B, 0x200B), (0x200E, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB),
    (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0001, 0xE0001), (0xE0020, 0xE007F),
)  # fmt: skip
# Text is normalised in stretches of this many characters, at most twice as many: the time that it takes grows with the
# square of the number of combining marks in a row.
STRETCH_CHARACTERS = 1024

NormalForm = Literal["NFC", "NFKC"]
Change = Callable[[Iterable[str]], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Changes that are made one after the other."""

    changes: tuple[Change, ...]

    @classmethod
    def of(cls, spec: CleaningSpec) -> Cleaning:
        """The changes that a spec asks for."""
        changes: list[Change] = []
        if spec.control_characters == "remove":
            changes.append(without_control_characters)
        if spec.line_endings == "unix":
            changes.append(with_unix_line_endings)
        if spec.normalise == "NFC":
            changes.append(in_nfc)
        elif spec.normalise == "NFKC":
            changes.append(in_nfkc)
        return cls(tuple(changes))

    def apply(self, part: Pieces) -> Pieces:
        """The cleaned part: at once if it is held in memory, piece by piece whenever it is walked if it is read."""
        if not self.changes:
            return part
        cleaned = _CleanedPieces(part, self.changes)
        return ("".join(cleaned),) if isinstance(part, tuple) else cleaned


@dataclass(frozen=True, slots=True)
class _CleanedPieces:
    pieces: Pieces
    changes: tuple[Change, ...]

    def __iter__(self) -> Iterator[str]:
        pieces = iter(self.pieces)
        for change in self.changes:
            pieces = change(pieces)
        return pieces


def without_control_characters(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        codes = _codes(piece)
        is_control = _is_control().take(codes)
        yield codes[~is_control].tobytes().decode("utf-32-le", "surrogatepass") if is_control.any() else piece


def has_control_characters(text: str) -> bool:
    return bool(_is_control().take(_codes(text)).any())


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@cache
def _is_control() -> NDArray[np.bool_]:
    """Of each code point. A look-up is several times faster than a regular expression."""
    flags = np.zeros(0x110000, np.bool_)
    for first, last in CONTROL_CHARACTERS:
        flags[first : last + 1] = True
    return flags


def with_unix_line_endings(pieces: Iterable[str]) -> Iterator[str]:
    """CR LF and CR become LF."""
    held = ""  # a CR at the end of a piece, until it is known what follows
    for piece in pieces:
        piece = held + piece
        held = "\r" if piece.endswith("\r") else ""
        yield piece.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
    if held:
        yield "\n"


def in_nfc(pieces: Iterable[str]) -> Iterator[str]:
    return normalised(pieces, "NFC")


def in_nfkc(pieces: Iterable[str]) -> Iterator[str]:
    return normalised(pieces, "NFKC")


def normalised(pieces: Iterable[str], form: NormalForm) -> Iterator[str]:
    """The normal form of the whole text.

    Only where more than STRETCH_CHARACTERS combining marks follow one another, as no language has it, may the pieces
    decide in which order they end up.
    """
    held = ""  # the last character and its marks, which the next piece may add to
    for piece in pieces:
        text = held + piece
        cut = _last_cut(text)
        held = text[cut:]
        yield _normalised_in_stretches(text[:cut], form)
    yield _normalised_in_stretches(held, form)


def _last_cut(text: str) -> int:
    lowest = max(len(text) - STRETCH_CHARACTERS, 0)
    places = (place for place in range(len(text) - 1, lowest - 1, -1) if can_cut_before(text[place]))
    return next(places, lowest)


def _normalised_in_stretches(text: str, form: NormalForm) -> str:
    if text.isascii():
        return text
    stretches = []
    start = 0
    while start < len(text):
        end = start + STRETCH_CHARACTERS
        while end < min(len(text), start + 2 * STRETCH_CHARACTERS) and not can_cut_before(text[end]):
            end += 1
        stretches.append(unicodedata.normalize(form, text[start:end]))
        start = end
    return "".join(stretches)


def can_cut_before(character: str) -> bool:
    """If normal forms, composed or decomposed, never join the character to the one before it or move it there.

    What composes with its predecessor are marks, the vowels and final consonants of Hangul (U+1160 to U+11FF) and some
    vowel signs of Kirat Rai (U+16D63 to U+16D67).
    """
    if character < "\u0300":
        return True
    first = unicodedata.normalize("NFKD", character)[0]
    if "\u1160" <= first <= "\u11ff" or "\U00016d63" <= first <= "\U00016d6a":
        return False
    return unicodedata.combining(first) == 0 and not unicodedata.category(first).startswith("M")
