"""Changes of characters: what they do, and that it does not depend on where the text is cut into pieces."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.normalise import CONTROL_CHARACTERS, Cleaning, NormalForm, can_cut_before, has_control_characters
from data_prep.spec import CleaningSpec

EVERYTHING = CleaningSpec(normalise="NFC", line_endings="unix", control_characters="remove")
# Letters, marks that compose and that reorder, Hangul, half-width kana, Indic vowels, line ends, controls.
texts = st.text(
    st.sampled_from(
        list("ae \r\n\t\0\u0301\u0323\u0327\u200b\u200d\u1100\u1161\u11a8\uac00\uff76\uff9e\u0bc6\u0bbe\u212bﬁ½")
    )
    | st.characters(exclude_categories=("Cs",)),
    max_size=30,
)
cuts = st.lists(st.integers(0, 40), max_size=6)


class Stream:
    """Pieces that can be walked again and are no tuple: as a file is."""

    def __init__(self, text: str, places: list[int]) -> None:
        self.bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
        self.text = text
        self.walks = 0

    def __iter__(self) -> Iterator[str]:
        self.walks += 1
        return (self.text[start:stop] for start, stop in pairwise(self.bounds))


def cleaned(text: str, places: list[int], **keys: str) -> str:
    return "".join(Cleaning.of(CleaningSpec(**keys)).apply(Stream(text, places)))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(texts, cuts)
def test_pieces_are_normalised_as_the_whole_text_is(form: NormalForm, text: str, places: list[int]) -> None:
    assert cleaned(text, places, normalise=form) == unicodedata.normalize(form, text)


@given(texts, cuts)
def test_line_endings_become_unix_wherever_they_are_cut(text: str, places: list[int]) -> None:
    assert cleaned(text, places, line_endings="unix") == text.replace("\r\n", "\n").replace("\r", "\n")


@given(texts, cuts)
def test_control_characters_are_removed(text: str, places: list[int]) -> None:
    kept = "".join(
        character
        for character in text
        if not any(first <= ord(character) <= last for first, last in CONTROL_CHARACTERS)
    )
    assert cleaned(text, places, control_characters="remove") == kept
    assert has_control_characters(text) == (kept != text)


@given(texts, cuts)
def test_all_changes_together_do_not_depend_on_the_pieces_and_leave_nothing_to_do(text: str, places: list[int]) -> None:
    cleaning = Cleaning.of(EVERYTHING)
    (whole,) = cleaning.apply((text,))
    assert "".join(cleaning.apply(Stream(text, places))) == whole
    assert cleaning.apply((whole,)) == (whole,)


def test_what_a_removed_character_kept_apart_is_joined() -> None:
    assert Cleaning.of(EVERYTHING).apply(("e\u200b\u0301 one\r\0\ntwo",)) == ("é one\ntwo",)


def test_control_characters_are_those_of_unicode_that_cannot_be_seen() -> None:
    by_category: dict[str, list[str]] = {}
    for character in map(chr, range(sys.maxunicode + 1)):
        by_category.setdefault(unicodedata.category(character), []).append(character)
    assert [character for character in by_category.pop("Cc") if not has_control_characters(character)] == list("\t\n\r")
    kept = [character for character in by_category.pop("Cf") if not has_control_characters(character)]
    assert {"\u200c", "\u200d", "\u06dd"} <= set(kept)  # the joiners, and the end of an ayah, which is drawn
    by_category.pop("Cn")  # unassigned ones that will be of these kinds
    for characters in by_category.values():
        assert not has_control_characters("".join(characters))


def test_nothing_that_composes_with_its_predecessor_may_begin_a_piece() -> None:
    """All of Unicode, as this interpreter knows it."""
    checked = 0
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.combining(character):
            assert not can_cut_before(character)
        decomposed = unicodedata.decomposition(character).split()
        if len(decomposed) == 2 and not decomposed[0].startswith("<"):
            assert not can_cut_before(chr(int(decomposed[1], 16))), hex(ord(character))
            checked += 1
    assert checked > 900
    assert not can_cut_before("\u1161")
    assert not can_cut_before("\u11a8")
    assert not can_cut_before("\uff9e")  # in NFKC a mark that composes
    assert all(map(can_cut_before, "aé \n年가か"))


def test_a_stream_is_cleaned_each_time_it_is_walked_and_a_record_at_once() -> None:
    stream = Stream("a\r\nb", [1, 2])
    part = Cleaning.of(EVERYTHING).apply(stream)
    assert stream.walks == 0
    assert ["".join(part), "".join(part)] == ["a\nb", "a\nb"]
    assert stream.walks == 2
    record = ("a\r\nb",)
    assert Cleaning.of(EVERYTHING).apply(record) == ("a\nb",)
    assert Cleaning.of(CleaningSpec()).apply(record) is record


def test_a_stream_holds_back_a_few_characters_only() -> None:
    given_out = 0
    taken = 0

    def pieces() -> Iterator[str]:
        nonlocal taken
        for _ in range(50):
            taken += 10_000
            yield "ก้" * 5_000  # no space in sight

    (part,) = map(Cleaning.of(EVERYTHING).apply, [pieces()])
    for piece in part:
        given_out += len(piece)
        assert taken - given_out < 100
    assert given_out == 500_000


def test_many_marks_in_a_row_take_no_time_to_speak_of() -> None:
    """Ordering them takes the square of their number, if they are ordered at once."""
    started = time.perf_counter()
    marks = "\u0301\u0323" * 100_000
    assert len(cleaned("a" + marks, [5, 70_000], normalise="NFC")) > 190_000
    assert time.perf_counter() - started < 10
