"""Word and n-gram hashes against words that are cut one character at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import ngrams
from data_prep.ngrams import BLOCK_CHARACTERS, Hashes, NgramHasher, WordHasher, distinct, hash_ngrams, word_hashes

M = 0x9E3779B97F4A7C15
K = 0xD1342543DE82EF95

# Letters of several scripts, separators of one to three bytes, characters that are words of their own, odd cases.
texts = st.text(st.sampled_from(list("abAB09 ,._\n\0éßΣσς“—年の、กЖ𠀀\ud800")) | st.characters(), max_size=40)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:stop] for start, stop in pairwise(bounds)]


def slow_words(text: str) -> list[str]:
    """Words of a text, cut one character at a time."""
    words: list[str] = []
    goes_on = False
    for character in text:
        code = ord(character)
        is_separator = any(first <= code <= last for first, last in ngrams._SEPARATORS)
        is_alone = any(first <= code <= last for first, last in ngrams._WITHOUT_SPACES) and not is_separator
        folded = character.casefold()
        letter = folded if len(folded) == 1 else character
        if goes_on and not is_separator and not is_alone:
            words[-1] += letter
        elif not is_separator:
            words.append(letter)
        goes_on = not is_separator and not is_alone
    return words


def slow_mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def slow_hash(word: str) -> int:
    alone = 1 << 24 if any(first <= ord(word[0]) <= last for first, last in ngrams._WITHOUT_SPACES) else 0
    return slow_mix(sum((ord(letter) + alone) * M**place for place, letter in enumerate(word)) % 2**64)


def hashes_of(pieces: list[str]) -> Hashes:
    return np.concatenate(list(word_hashes(pieces)))


@given(texts, st.lists(st.integers(0, 50), max_size=5), st.integers(2, 9))
def test_words_are_those_of_the_slow_way_wherever_the_text_is_cut(text: str, places: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "BLOCK_CHARACTERS", block)
        hashes = hashes_of(cut(text, places))
    assert hashes.tolist() == [slow_hash(word) for word in slow_words(text)]


def test_a_word_longer_than_blocks_and_pieces_is_one_word() -> None:
    word = "ab" * BLOCK_CHARACTERS
    expected = hashes_of([f"x {word}y"])
    assert len(expected) == 2
    assert hashes_of(["x ", word[:7], "", word[7:], "y"]).tolist() == expected.tolist()
    assert hashes_of([f"x {word}z"])[1] != expected[1]


def test_case_and_punctuation_do_not_matter_but_letters_do() -> None:
    assert hashes_of(["The CAT, “sat”—down."]).tolist() == hashes_of(["the cat sat down"]).tolist()
    assert hashes_of(["the cat sat dawn"])[3] != hashes_of(["the cat sat down"])[3]
    assert len(hashes_of(["我们走吧，ok"])) == 5  # without spaces, every character is a word


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(1, 8), st.lists(st.integers(0, 30), max_size=4))
def test_ngrams_are_those_of_the_slow_way_wherever_the_words_are_cut(
    words: list[int], length: int, places: list[int]
) -> None:
    expected = []
    for start in range(len(words) - length + 1):
        value = length
        for word in words[start : start + length]:
            value = (value * K + word) % 2**64
        expected.append(slow_mix(value))
    hasher = NgramHasher(length)
    array = np.array(words, np.uint64)
    found = [hasher.add(part) for part in np.split(array, sorted(place % (len(words) + 1) for place in places))]
    assert np.concatenate(found).tolist() == expected
    assert hasher.tail.tolist() == words[max(len(words) - length + 1, 0) :]


def test_hashes_are_these_for_ever() -> None:
    """Files of hashes and the documents that are dropped depend on them."""
    words = hashes_of(["The river runs. 年"])
    assert words.tolist() == [11469020329213407588, 18255283470955566, 17194869019401258585, 13735561096294728530]
    assert hash_ngrams(words, 3).tolist() == [11254446125469588653, 17945617771501998314]


def test_the_hashes_spread_over_all_bits() -> None:
    hashes = hashes_of([" ".join(f"word{number}" for number in range(20_000))])
    assert len(distinct(hashes)) == 20_000
    ones = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.02


def test_after_its_end_a_hasher_begins_anew() -> None:
    hasher = WordHasher()
    first = [*hasher.add("one tw"), hasher.end()]
    second = [*hasher.add("o"), hasher.end()]
    assert np.concatenate(first).tolist() == hashes_of(["one tw"]).tolist()
    assert np.concatenate(second).tolist() == hashes_of(["o"]).tolist()


def test_distinct_sorts_and_drops_repetitions() -> None:
    assert distinct(np.array([3, 1, 3, 2**64 - 1, 1], np.uint64)).tolist() == [1, 3, 2**64 - 1]
    assert distinct(np.empty(0, np.uint64)).tolist() == []
