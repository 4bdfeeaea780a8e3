"""What is done to a document before it may enter the dataset: its text is cleaned, then walked once and judged.

A document may be set aside for one reason, the first that holds. Faults are records that cannot be read:

| reason | when |
|---|---|
| `not_utf8` | a file of text is not valid UTF-8 |
| `invalid_unicode` | a text has a lone surrogate, which JSON can spell and UTF-8 cannot |

and these are the filters:

| reason | when |
|---|---|
| `empty` | a text, source or target has nothing but white space |
| `control_characters` | `cleaning.control_characters = "reject"` and there is one |
| `too_short`, `too_long` | its characters, header not counted, are beyond `min_characters`, `max_characters` |
| `repetitive` | more of its word 10-grams than `max_repetition` occurred before (of the first million words) |
| `contaminated` | it has an n-gram of words in common with the `evaluation` files |
| `exact_duplicate`, `near_duplicate` | an earlier document is equal, or similar |
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_prep.contamination import Contamination, ContaminationSearch
from data_prep.documents import Document, Pieces, Rejection, Screened
from data_prep.ngrams import Hashes, NgramHasher, WordHasher, distinct
from data_prep.normalise import Cleaning, has_control_characters
from data_prep.spec import CleaningSpec
from mdseq.data.format import DocumentHash

EXCERPT_CHARACTERS = 500
REPETITION_WORDS = 10
JUDGED_WORDS = 1_000_000  # of a longer document; 8 MB of hashes


class Screen:
    """Cleans and judges documents; rejections pass through."""

    def __init__(self, spec: CleaningSpec, contamination: Contamination | None = None) -> None:
        self._spec = spec
        self._cleaning = Cleaning.of(spec)
        self._contamination = contamination

    def __call__(self, record: Document | Rejection) -> Screened | Rejection:
        if isinstance(record, Rejection):
            return record
        document = replace(record, parts=tuple(map(self._cleaning.apply, record.parts)))
        walk = _Walk(self._spec, self._contamination)
        try:
            walk.through(document)
        except UnicodeDecodeError as error:
            around = EXCERPT_CHARACTERS // 2
            place = error.object[max(error.start - around, 0) : error.start + around]
            return _rejection(document, "not_utf8", place.decode(errors="replace"), is_fault=True)
        except UnicodeEncodeError:
            return _rejection(document, "invalid_unicode", walk.beginning, is_fault=True)
        reason = walk.reason_to_set_aside()
        if reason is not None:
            return _rejection(document, reason, walk.beginning, is_fault=False)
        return Screened(document, walk.document_id(), walk.text_bytes)


def set_aside(screened: Screened, reason: str) -> Rejection:
    """The rejection of a document that was found good in itself."""
    beginning = next((piece for part in screened.document.parts for piece in part if piece), "")
    return _rejection(screened.document, reason, beginning, is_fault=False)


def _rejection(document: Document, reason: str, text: str, is_fault: bool) -> Rejection:
    # What UTF-8 cannot spell becomes a question mark: the excerpt is written to a file.
    excerpt = text[:EXCERPT_CHARACTERS].encode(errors="replace").decode()
    return Rejection(document.origin, document.row, reason, excerpt, is_fault)


class _Walk:
    """One pass over a cleaned document: its identity, its size, and what the filters want to know of it."""

    def __init__(self, spec: CleaningSpec, contamination: Contamination | None) -> None:
        self.text_bytes = 0
        self.beginning = ""
        self._spec = spec
        self._hash = DocumentHash()
        self._num_characters = 0
        self._is_empty = False
        self._has_control_characters = False
        self._repetition = _Repetition() if spec.max_repetition < 1 else None
        self._contamination = ContaminationSearch(contamination) if contamination is not None else None
        self._looks_at_words = self._repetition is not None or self._contamination is not None

    def through(self, document: Document) -> None:
        """Raises UnicodeDecodeError and UnicodeEncodeError."""
        self.text_bytes += len(document.header.encode())
        for part in document.parts:
            self._through_part(part)

    def _through_part(self, part: Pieces) -> None:
        is_blank = True
        words = WordHasher()
        for piece in part:
            if len(self.beginning) < EXCERPT_CHARACTERS:
                self.beginning += piece[:EXCERPT_CHARACTERS]
            content = piece.encode()
            self._hash.update(content)
            self.text_bytes += len(content)
            self._num_characters += len(piece)
            is_blank = is_blank and (not piece or piece.isspace())
            if self._spec.control_characters == "reject" and not self._has_control_characters:
                self._has_control_characters = has_control_characters(piece)
            if self._looks_at_words:
                for hashes in words.add(piece):
                    self._add_words(hashes)
        if self._looks_at_words:
            self._add_words(words.end())
        self._hash.end_part()
        if self._contamination is not None:
            self._contamination.end_part()
        self._is_empty = self._is_empty or is_blank

    def _add_words(self, words: Hashes) -> None:
        if self._repetition is not None:
            self._repetition.add(words)
        if self._contamination is not None:
            self._contamination.add(words)

    def document_id(self) -> bytes:
        return self._hash.document_id()

    def reason_to_set_aside(self) -> str | None:
        """The first filter that does not let the document pass."""
        spec = self._spec
        filters = {
            "empty": self._is_empty,
            "control_characters": self._has_control_characters,
            "too_short": self._num_characters < spec.min_characters,
            "too_long": 0 < spec.max_characters < self._num_characters,
            "repetitive": self._repetition is not None and self._repetition.share() > spec.max_repetition,
            "contaminated": self._contamination is not None and self._contamination.found,
        }
        return next((reason for reason, holds in filters.items() if holds), None)


class _Repetition:
    """Share of a document's word n-grams that occurred before in it, judged by its first JUDGED_WORDS words."""

    def __init__(self) -> None:
        self._hasher = NgramHasher(REPETITION_WORDS)
        self._ngrams: list[Hashes] = []
        self._words_left = JUDGED_WORDS

    def add(self, words: Hashes) -> None:
        words = words[: self._words_left]
        self._words_left -= len(words)
        if len(words):
            self._ngrams.append(self._hasher.add(words))

    def share(self) -> float:
        num_ngrams = sum(map(len, self._ngrams))
        if num_ngrams == 0:
            return 0.0
        return 1 - len(distinct(np.concatenate(self._ngrams))) / num_ngrams
