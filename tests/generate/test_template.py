"""Gaps are found, kept text is kept, and spaces are where they should be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.tokenizer import Tokenizer
from mdseq.errors import UserError
from mdseq.generate.template import Template


def test_gaps_and_kept_parts() -> None:
    template = Template.parse("The king [[8]] and went [[4]] home")
    assert template.parts == ("The king ", 8, " and went ", 4, " home")
    assert Template.parse("[[3]][[5]]").parts == (3, 5)


def test_what_looks_like_a_gap_but_is_none() -> None:
    assert Template.parse("[[x]] [[ 3 ]] [3] [[2]]]]").parts == ("[[x]] [[ 3 ]] [3] ", 2, "]]")


def test_another_marker_for_a_text_with_such_marks() -> None:
    assert Template.parse("see [[8]] <<3>> there", "<<N>>").parts == ("see [[8]] ", 3, " there")
    assert Template.parse("a (gap 12)?", "(gap N)").parts == ("a ", 12, "?")


@pytest.mark.parametrize(
    ("text", "marker", "message"),
    [
        ("nothing to do", "[[N]]", "has no gap to fill; write each as [[8]]"),
        ("a [[0]]", "[[N]]", "has a gap of no tokens"),
        ("a [[3]]", "<<8>>", "gap marker '<<8>>' is not allowed"),
        ("a 3", "N", "gap marker 'N' is not allowed"),
        ("a [3", "[N", "gap marker '[N' is not allowed"),
        ("a NN", "<NN>", "gap marker '<NN>' is not allowed"),
        ("a NN", "<N1>", "gap marker '<N1>' is not allowed"),
    ],
)
def test_mistakes(text: str, marker: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        Template.parse(text, marker)
    assert message in str(raised.value)


def test_the_space_before_a_gap_is_left_to_it() -> None:
    assert Template.parse("The king [[8]] and  [[4]]home").given == ("The king", 8, " and ", 4, "home")
    assert Template.parse("a\n[[8]]").given == ("a\n", 8)
    assert Template.parse(" [[8]] ").given == ("", 8, " ")


@pytest.mark.parametrize(
    ("text", "fills", "expected"),
    [
        ("The king [[8]] and left", [" slept"], "The king slept and left"),  # as a vocabulary writes words
        ("The king [[8]] and left", ["slept"], "The king slept and left"),
        ("The king [[8]] and left", ["slept "], "The king slept and left"),
        ("The king[[8]] and left", [" slept"], "The king slept and left"),
        ("The king[[8]] and left", ["dom"], "The kingdom and left"),
        ("The king [[8]]", [" slept "], "The king slept "),
        ("[[8]] [[3]]", ["one", " two"], "one two"),
        ("a [[8]] b", [""], "a  b"),  # kept text is kept
    ],
)
def test_spaces_at_the_seams(text: str, fills: list[str], expected: str) -> None:
    assert Template.parse(text).filled(fills) == expected


@given(kept=st.lists(st.text(), min_size=1, max_size=4), fills=st.lists(st.text(), min_size=4, max_size=4))
def test_kept_parts_come_back_in_order(kept: list[str], fills: list[str]) -> None:
    """The text with its gaps filled is the kept parts with something between them, whatever the parts hold."""
    template = Template(tuple(part for text in kept for part in (text, 8))[:-1] if len(kept) > 1 else (kept[0], 8))
    whole = template.filled(fills)
    for part in template.parts:
        if isinstance(part, str):
            found = whole.find(part)
            assert found >= 0
            whole = whole[found + len(part) :]


@given(parts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=5))
def test_parts_encoded_one_by_one_are_decoded_to_the_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    ids = [tokenizer.encode(part).tolist() for part in parts]
    assert [tokenizer.decode(part) for part in ids] == parts
    assert tokenizer.decode([token for part in ids for token in part]) == "".join(parts)
