"""The n-grams of evaluation texts against sets of tuples of words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_prep import contamination as module
from data_prep.contamination import FEWEST_WORDS, Contamination, ContaminationSearch
from data_prep.documents import Document
from data_prep.ngrams import word_hashes


def document(*parts: str) -> Document:
    return Document("e.jsonl", 0, tuple((part,) for part in parts))


def is_found(contamination: Contamination, *parts: str) -> bool:
    search = ContaminationSearch(contamination)
    for part in parts:
        for words in word_hashes([part]):
            search.add(words)
        search.end_part()
    return search.found


def text_of(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices("abcdefgh", k=num_words))


def grams(text: str, length: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@pytest.mark.parametrize("batch", [1, 50, 1 << 22])
def test_membership_is_that_of_sets_of_words(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_HASHES", batch)
    rng = random.Random(0)
    evaluation = [text_of(rng, num_words) for num_words in (3, 4, 5, 40, 300)]
    contamination = Contamination.of([document(text) for text in evaluation], 4)
    forbidden = set().union(*(grams(text, 4) for text in evaluation))
    assert len(contamination.hashes) == len(forbidden)
    assert contamination.lengths == (4,)
    answers = []
    for _ in range(300):
        text = text_of(rng, rng.randint(0, 12))
        answers.append(is_found(contamination, text))
        assert answers[-1] == bool(grams(text, 4) & forbidden)
    assert 30 < sum(answers) < 270


def test_short_texts_count_whole_if_they_are_not_too_short() -> None:
    words = [f"w{number}" for number in range(20)]
    contamination = Contamination.of(
        [document(" ".join(words[:FEWEST_WORDS]), " ".join(words[8 : 8 + FEWEST_WORDS - 1])), document("")], 13
    )
    assert contamination.lengths == (FEWEST_WORDS,)
    assert is_found(contamination, "before " + " ".join(words[:FEWEST_WORDS]) + " after")
    assert not is_found(contamination, " ".join(words[: FEWEST_WORDS - 1]))
    assert not is_found(contamination, " ".join(words[8:]))


def test_a_mixture_of_lengths_is_looked_for() -> None:
    words = [f"w{number}" for number in range(40)]
    contamination = Contamination.of([document(" ".join(words[:20])), document(" ".join(words[20:29]))], 13)
    assert contamination.lengths == (9, 13)
    assert is_found(contamination, " ".join(words[3:16]))
    assert not is_found(contamination, " ".join(words[3:15]))
    assert is_found(contamination, " ".join(words[15:35]))


def test_a_saved_set_is_the_same_when_loaded(tmp_path: Path) -> None:
    rng = random.Random(1)
    documents = [document(text_of(rng, 200)), document(text_of(rng, 9))]
    contamination = Contamination.of(documents, 13)
    contamination.save(tmp_path / "evaluation.arrow")
    loaded = Contamination.load(tmp_path / "evaluation.arrow")
    assert np.array_equal(loaded.hashes, contamination.hashes)
    assert not loaded.hashes.flags.owndata  # mapped, not read
    assert loaded.lengths == contamination.lengths == (9, 13)
    assert Contamination.of(documents[::-1], 13).hashes.tolist() == contamination.hashes.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.arrow"]


def test_an_empty_set_finds_nothing(tmp_path: Path) -> None:
    Contamination.of([], 13).save(tmp_path / "evaluation.arrow")
    loaded = Contamination.load(tmp_path / "evaluation.arrow")
    assert not is_found(loaded, "one two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    assert not loaded.contains_any(np.array([0, 1, 2**64 - 1], np.uint64))
