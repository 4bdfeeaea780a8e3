"""Hashes of words and of word n-grams: the one mechanism under repetition, contamination and near duplicates.

Text is case-folded and taken as an array of code points. A word is a run of letters, digits and whatever is no
separator; a character of a script that is written without spaces is a word of its own. A word's hash is a polynomial
in an odd M modulo 2^64, which has an inverse, so that all words of a block come from one cumulative sum:

    hash(c_0 .. c_k) = mix(sum_i c_i M^i),   sum_{i = start}^{end - 1} c_i M^(i - start) = (P_end - P_start) M^(-start)

Nothing depends on where a text is cut into pieces, on the machine or on the release of Python but for case folding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BLOCK_CHARACTERS = 1 << 16
_MODULUS = 1 << 64
_WORD_MULTIPLIER = 0x9E3779B97F4A7C15
_NGRAM_MULTIPLIER = np.uint64(0xD1342543DE82EF95)

_SEPARATOR, _WORD_OF_ITS_OWN = 0, 1 << 24
_END_OF_CASES = 0x20000  # no script beyond has upper and lower case
_SEPARATORS = (
    (0x00, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0xBF),  # ASCII but letters and digits; Latin-1 signs
    (0x2000, 0x206F), (0x3000, 0x303F), (0xFE30, 0xFE4F), (0xFF00, 0xFF0F), (0xFF1A, 0xFF20),  # punctuation
    (0xFEFF, 0xFEFF),
)  # fmt: skip
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai, Lao, Burmese, Khmer
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # kana, ideographs
)  # fmt: skip


@cache
def _symbols() -> NDArray[np.uint32]:
    """What each code point counts as: 0 a separator, itself in folded case a letter, with a mark a word of its own."""
    symbols = np.arange(0x110000, dtype=np.uint32)
    for code in range(_END_OF_CASES):
        # Case folding, unlike lower case, looks at no neighbour (a final sigma does), which may lie in another piece.
        folded = chr(code).casefold()
        symbols[code] = ord(folded) if len(folded) == 1 else code
    for first, last in _WITHOUT_SPACES:
        symbols[first : last + 1] |= _WORD_OF_ITS_OWN
    for first, last in _SEPARATORS:
        symbols[first : last + 1] = _SEPARATOR
    return symbols


def _powers(base: int) -> Hashes:
    """base^0 .. base^BLOCK_CHARACTERS modulo 2^64."""
    factors = np.full(BLOCK_CHARACTERS + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_POWERS = _powers(_WORD_MULTIPLIER)
_INVERSE_POWERS = _powers(pow(_WORD_MULTIPLIER, -1, _MODULUS))


def mixed(values: Hashes) -> Hashes:
    """The finaliser of splitmix64, a bijection in which every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class WordHasher:
    """Words of a text that comes in pieces, as hashes. A word is known when the next one, or the end, is."""

    def __init__(self) -> None:
        self._open_sum: int | None = None  # of the word that ends the last block, until it is known to be whole
        self._open_goes_on = False  # if a letter follows
        self._open_power = 1  # M to the number of its characters so far

    def add(self, text: str) -> Iterator[Hashes]:
        """Hashes of the words that end in `text`, in arrays of bounded size."""
        for start in range(0, len(text), BLOCK_CHARACTERS):
            yield self._block(text[start : start + BLOCK_CHARACTERS])

    def end(self) -> Hashes:
        """The last word, if it has not been given yet. The next `add` begins another text."""
        last = [] if self._open_sum is None else [self._open_sum]
        self._open_sum, self._open_goes_on = None, False
        return mixed(np.array(last, np.uint64))

    def _block(self, text: str) -> Hashes:
        symbols = _symbols().take(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"))
        is_alone = symbols >= _WORD_OF_ITS_OWN
        is_letter = (symbols != _SEPARATOR) & ~is_alone
        # The first character starts a word even if it continues one: those are joined below.
        starts = np.flatnonzero(is_alone | (is_letter & ~_shifted(is_letter, 1)))
        ends = np.flatnonzero(is_alone | (is_letter & ~_shifted(is_letter, -1))) + 1
        prefix = np.zeros(len(symbols) + 1, np.uint64)
        np.cumsum(symbols * _POWERS[: len(symbols)], out=prefix[1:])
        sums = (prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts]

        power_before = 1
        if self._open_sum is not None:
            if self._open_goes_on and is_letter[0]:
                power_before = self._open_power
                sums[0] = (self._open_sum + power_before * int(sums[0])) % _MODULUS
            else:
                sums = np.concatenate([np.array([self._open_sum], np.uint64), sums])
        self._open_sum, self._open_goes_on = None, bool(is_letter[-1])
        if symbols[-1] == _SEPARATOR:
            return mixed(sums)
        self._open_sum = int(sums[-1])
        is_whole_block = starts[-1] == 0
        self._open_power = int(_POWERS[len(symbols) - starts[-1]]) * (power_before if is_whole_block else 1) % _MODULUS
        return mixed(sums[:-1])


def word_hashes(pieces: Iterable[str]) -> Iterator[Hashes]:
    """Hashes of all words of a text, in arrays of bounded size."""
    hasher = WordHasher()
    for piece in pieces:
        yield from hasher.add(piece)
    yield hasher.end()


def _shifted(flags: NDArray[np.bool_], by: Literal[1, -1]) -> NDArray[np.bool_]:
    """Of each character, the flag of the one before (1) or after (-1); False beyond the block."""
    shifted = np.zeros_like(flags)
    if by == 1:
        shifted[1:] = flags[:-1]
    else:
        shifted[:-1] = flags[1:]
    return shifted


def hash_ngrams(words: Hashes, length: int) -> Hashes:
    """Hashes of all runs of `length` words: [max(len(words) - length + 1, 0)]. Other lengths give other hashes."""
    count = max(len(words) - length + 1, 0)
    hashes = np.full(count, length, np.uint64)
    for offset in range(length):
        hashes *= _NGRAM_MULTIPLIER
        hashes += words[offset : offset + count]
    return mixed(hashes)


class NgramHasher:
    """n-grams of words that come in arrays. `tail`: the last words, which later n-grams will need: all if too few."""

    def __init__(self, length: int) -> None:
        assert length > 0
        self.length = length
        self.tail: Hashes = np.empty(0, np.uint64)

    def add(self, words: Hashes) -> Hashes:
        """Hashes of the n-grams that end in `words`."""
        words = np.concatenate([self.tail, words])
        self.tail = words[max(len(words) - self.length + 1, 0) :]
        return hash_ngrams(words, self.length)


def distinct(hashes: Hashes) -> Hashes:
    """Each hash once, sorted. `np.unique` builds a table first, which makes it several times slower."""
    hashes = np.sort(hashes)
    is_new = np.ones(len(hashes), np.bool_)
    is_new[1:] = hashes[1:] != hashes[:-1]
    return hashes[is_new]
