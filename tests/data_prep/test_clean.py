"""Documents are identified, measured and judged by one walk; every filter, and every fault, by its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import clean
from data_prep.clean import EXCERPT_CHARACTERS, Screen, set_aside
from data_prep.contamination import Contamination
from data_prep.documents import Document, Pieces, Rejection, Screened
from data_prep.spec import CleaningSpec
from mdseq.data.format import document_id


def screen(*parts: str | Pieces, header: str = "", contamination: Contamination | None = None, **keys: Any) -> Any:
    document = Document("a.txt", 3, tuple((part,) if isinstance(part, str) else part for part in parts), header)
    return Screen(CleaningSpec(**keys), contamination)(document)


def reason(*parts: str | Pieces, **keys: Any) -> str | None:
    result = screen(*parts, **keys)
    return result.reason if isinstance(result, Rejection) else None


class Failing:
    """A file whose text ends in a byte that is no UTF-8."""

    def __iter__(self) -> Iterator[str]:
        yield "good so far. "
        yield b"bad \xff end".decode()


def test_by_default_a_document_passes_untouched() -> None:
    document = Document("a.txt", 3, (("caf\u0065\u0301\r\n\x00",), ("b", "", "c")), "# a.txt\n")
    screened = Screen(CleaningSpec())(document)
    assert isinstance(screened, Screened)
    assert all(part is given for part, given in zip(screened.document.parts, document.parts, strict=True))
    assert screened.document_id == document_id("caf\u0065\u0301\r\n\x00", "bc")
    assert screened.text_bytes == len("# a.txt\ncaf\u0065\u0301\r\n\x00bc".encode())


def test_identity_and_size_are_those_of_the_cleaned_text() -> None:
    screened = screen("cafe\u0301\r\n", normalise="NFC", line_endings="unix")
    assert screened.document.parts == (("café\n",),)
    assert screened.document_id == document_id("café\n")
    assert screened.text_bytes == 6


@given(st.text(st.sampled_from("ab \u0301\r\n"), min_size=1, max_size=20), st.integers(0, 20))
def test_a_document_is_judged_alike_however_it_is_cut(text: str, place: int) -> None:
    keys: dict[str, Any] = {"normalise": "NFC", "line_endings": "unix", "max_repetition": 0.5, "min_characters": 3}
    whole, pieces = screen(text, **keys), screen([text[:place], text[place:]], **keys)
    if isinstance(whole, Rejection):
        assert whole == pieces
    else:
        assert (whole.document_id, whole.text_bytes) == (pieces.document_id, pieces.text_bytes)
        assert "".join(whole.document.parts[0]) == "".join(pieces.document.parts[0])


def test_rejections_of_the_reader_pass_through() -> None:
    rejection = Rejection("a", 0, "not_json", "{")
    assert Screen(CleaningSpec())(rejection) is rejection


@pytest.mark.parametrize("parts", [("",), (" \n\t\u3000",), ([],), (["", "\n"],), ("text", " ")])
def test_white_space_alone_is_empty(parts: tuple[str | list[str], ...]) -> None:
    rejection = screen(*parts)
    assert (rejection.reason, rejection.is_fault) == ("empty", False)


def test_what_is_empty_once_cleaned_is_empty() -> None:
    assert reason("\x00\x01") is None
    assert reason("\x00\x01", control_characters="remove") == "empty"


@pytest.mark.parametrize("keys", [{}, {"normalise": "NFC", "control_characters": "remove", "max_repetition": 0.5}])
def test_a_lone_surrogate_is_a_fault(keys: dict[str, Any]) -> None:
    rejection = screen("before \ud800 after", **keys)
    assert (rejection.origin, rejection.row) == ("a.txt", 3)
    assert (rejection.reason, rejection.is_fault) == ("invalid_unicode", True)
    assert rejection.excerpt == "before ? after"
    assert reason("text", header="# \udcff.py\n") == "invalid_unicode"


def test_text_that_is_not_utf8_is_a_fault_shown_around_the_place() -> None:
    rejection = screen(Failing(), normalise="NFC")
    assert (rejection.reason, rejection.is_fault) == ("not_utf8", True)
    assert rejection.excerpt == "bad \ufffd end"


def test_control_characters_may_reject() -> None:
    assert reason("page\x0cbreak") is None
    assert reason("page\x0cbreak", control_characters="reject") == "control_characters"
    assert reason("tab\t, CR LF\r\n and joiner \u200d", control_characters="reject") is None


def test_length_limits_are_inclusive_and_count_characters_of_all_parts_but_the_header() -> None:
    assert reason("été", min_characters=3, max_characters=3) is None
    assert reason("été", min_characters=4, header="# path\n") == "too_short"
    assert reason("été", max_characters=2) == "too_long"
    assert reason("ab", "cd", min_characters=4, max_characters=4, header="# path\n") is None


def ten_grams_seen_before(words: list[str]) -> float:
    ngrams = [tuple(words[start : start + 10]) for start in range(len(words) - 9)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


@given(st.lists(st.sampled_from("ab"), max_size=60), st.sampled_from([0.0, 0.1, 0.3, 0.5]))
def test_repetition_is_the_share_of_ten_grams_seen_before(words: list[str], limit: float) -> None:
    expected = ten_grams_seen_before(words) > limit
    assert (reason("x " + " ".join(words), max_repetition=limit) == "repetitive") == (
        ten_grams_seen_before(["x", *words]) > limit
    )
    assert (reason(" ".join(words) or "?", max_repetition=limit) == "repetitive") == expected


def test_a_long_document_is_judged_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "JUDGED_WORDS", 100)
    varied = " ".join(f"word{number}" for number in range(100))
    assert reason(varied + " again" * 900, max_repetition=0.5) is None
    assert reason("again " * 100 + varied * 9, max_repetition=0.5) == "repetitive"


def test_contaminated_documents_are_set_aside() -> None:
    sentence = "seven grey cats watch the silver fish that swim below the old mill"
    contamination = Contamination.of([Document("e", 0, ((sentence,),))], 13)
    assert reason(f"He wrote: {sentence.upper()}!", contamination=contamination) == "contaminated"
    assert reason("another", f"It said {sentence}", contamination=contamination) == "contaminated"
    assert reason(sentence.replace("silver", "golden"), contamination=contamination) is None
    # The parts of a pair are two texts: no n-gram runs from one into the other.
    assert reason(sentence[:30], sentence[30:], contamination=contamination) is None


def test_the_first_reason_of_the_table_is_given() -> None:
    assert reason(" ", min_characters=5) == "empty"
    assert reason("\x00", min_characters=5, control_characters="reject") == "control_characters"


def test_excerpts_are_the_beginning_and_can_be_written() -> None:
    long: Iterable[str] = ["ab" * 100, "\u20ac" * 10_000]
    rejection = screen(long, max_characters=10)
    assert rejection.excerpt == ("ab" * 100 + "\u20ac" * 10_000)[:EXCERPT_CHARACTERS]
    screened = screen(["", "text"])
    assert set_aside(screened, "near_duplicate") == Rejection("a.txt", 3, "near_duplicate", "text", is_fault=False)
