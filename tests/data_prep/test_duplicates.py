"""Which documents are dropped, against true similarities of all pairs; and that nothing but their order matters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates, signatures
from data_prep.clean import Screen
from data_prep.documents import Document, Screened
from data_prep.duplicates import Dropped, find_duplicates, load_dropped
from data_prep.signatures import SignatureWriter, bands_for, min_hash
from data_prep.spec import CleaningSpec
from mdseq.errors import UserError

SCREEN = Screen(CleaningSpec())
Text = str | tuple[str, ...]


def screened(text: Text) -> Screened:
    parts = (text,) if isinstance(text, str) else text
    document = SCREEN(Document("a.txt", 0, tuple((part,) for part in parts)))
    assert isinstance(document, Screened)
    return document


def dropped_of(folder: Path, shards: Sequence[Sequence[Text]], near: float = 0.0) -> list[dict[int, Dropped]]:
    """What is dropped of each shard."""
    paths = [folder / f"signatures-{shard}.arrow" for shard in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        with SignatureWriter(path, near) as writer:
            for text in texts:
                writer.add(screened(text))
    find_duplicates(paths, near, folder / "dropped.arrow")
    return [dict(load_dropped(folder / "dropped.arrow", shard)) for shard in range(len(shards))]


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def edited(rng: random.Random, text: str, changes: int) -> str:
    """The text with so many words replaced."""
    changed = text.split()
    for place in rng.sample(range(len(changed)), changes):
        changed[place] = words(rng, 1)[0]
    return " ".join(changed)


def shingles(text: str) -> set[tuple[str, ...]]:
    split = text.split()
    return {tuple(split[start : start + 5]) for start in range(len(split) - 4)}


def jaccard(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / max(len(first | second), 1)


def test_equal_documents_are_dropped_but_the_first(tmp_path: Path) -> None:
    shards: list[list[Text]] = [["a", "b", "a"], [], ["c", "b", "B", "a "], ["a", ("a", "b"), ("ab", "b"), ("a", "b")]]
    exact = "exact_duplicate"
    assert dropped_of(tmp_path, shards) == [
        {2: Dropped(exact, 0, 0)},
        {},
        {1: Dropped(exact, 0, 1)},
        {0: Dropped(exact, 0, 0), 3: Dropped(exact, 3, 1)},
    ]


def test_ids_that_agree_in_one_half_are_not_equal(tmp_path: Path) -> None:
    ids = [b"A" * 16, b"A" * 8 + b"B" * 8, b"B" * 8 + b"A" * 8, b"A" * 8 + b"B" * 8, b"A" * 16, b"A" * 8 + b"C" * 8]
    with SignatureWriter(tmp_path / "s", 0.0) as writer:
        for document_id in ids:
            writer.add(Screened(screened("a").document, document_id, 1))
    find_duplicates([tmp_path / "s"], 0.0, tmp_path / "dropped")
    found = load_dropped(tmp_path / "dropped", 0)
    assert {ordinal: dropped.original_ordinal for ordinal, dropped in found.items()} == {3: 1, 4: 0}


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_the_true_similarities(threshold: float, tmp_path: Path) -> None:
    """Well above the threshold all are found, well below it none is dropped."""
    rng = random.Random(0)
    texts: list[str] = []
    for _ in range(40):
        original = " ".join(words(rng, rng.randint(40, 400)))
        copies = [edited(rng, original, rng.randint(0, len(original.split()) // 12)) for _ in range(rng.randint(0, 5))]
        texts += [original, *copies]
    rng.shuffle(texts)
    (dropped,) = dropped_of(tmp_path, [texts], threshold)
    for later, text in enumerate(texts):
        closest = max((jaccard(text, texts[earlier]) for earlier in range(later)), default=0.0)
        if closest >= threshold + 0.15:
            assert later in dropped
        elif closest <= threshold - 0.15:
            assert later not in dropped
        if later in dropped:
            original = texts[dropped[later].original_ordinal]
            assert dropped[later].original_ordinal < later
            assert jaccard(text, original) > threshold - 0.15
            assert (dropped[later].reason == "exact_duplicate") == (original == text)
    assert 20 < len(dropped) < len(texts) - 40 + 1


def test_the_result_depends_neither_on_shards_nor_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    original = " ".join(words(rng, 100))
    texts = [
        edited(rng, original, rng.randint(0, 6)) if rng.random() < 0.7 else f"other {rng.random()}" for _ in range(60)
    ]

    def found(shards: list[list[str]]) -> dict[int, tuple[str, int]]:
        firsts = np.cumsum([0, *map(len, shards)])
        return {
            int(firsts[shard]) + ordinal: (drop.reason, int(firsts[drop.original_shard]) + drop.original_ordinal)
            for shard, dropped in enumerate(dropped_of(tmp_path, shards, 0.6))
            for ordinal, drop in dropped.items()
        }

    expected = found([texts])
    assert len(expected) > 20
    assert found([texts[:7], [], texts[7:8], texts[8:]]) == expected
    monkeypatch.setattr(signatures, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(duplicates, "_COMPARED_AT_ONCE", 3)
    assert found([texts[:30], texts[30:]]) == expected


def test_later_documents_change_nothing_for_earlier_ones(tmp_path: Path) -> None:
    rng = random.Random(2)
    original = " ".join(words(rng, 60))
    texts = [edited(rng, original, rng.randint(0, 8)) for _ in range(30)]
    (whole,) = dropped_of(tmp_path, [texts], 0.5)
    (part,) = dropped_of(tmp_path, [texts[:12]], 0.5)
    assert part == {ordinal: dropped for ordinal, dropped in whole.items() if ordinal < 12}


def test_of_a_chain_only_the_first_stays(tmp_path: Path) -> None:
    """Each is like the one before, the last is unlike the first."""
    rng = random.Random(3)
    pool = words(rng, 600)
    chain = [" ".join(pool[start : start + 400]) for start in range(0, 200, 25)]
    assert jaccard(chain[0], chain[1]) > 0.85
    assert jaccard(chain[0], chain[-1]) < 0.5
    (dropped,) = dropped_of(tmp_path, [chain], 0.7)
    assert sorted(dropped) == list(range(1, len(chain)))
    assert dropped[len(chain) - 1].original_ordinal > 0


def test_short_documents_are_only_compared_for_equality(tmp_path: Path) -> None:
    texts = ["one two three four", "One two three, four", ".", "!", "one two three four", ".", "a b c d e", "A b c d e"]
    (dropped,) = dropped_of(tmp_path, [texts], 0.5)
    assert dropped == {
        4: Dropped("exact_duplicate", 0, 0),
        5: Dropped("exact_duplicate", 0, 2),
        7: Dropped("near_duplicate", 0, 6),
    }


def test_the_two_parts_of_a_pair_count_together(tmp_path: Path) -> None:
    rng = random.Random(4)
    source, target, other = (" ".join(words(rng, 60)) for _ in range(3))
    pairs: list[Text] = [(source, target), (source, other), (edited(rng, source, 1), edited(rng, target, 1))]
    (dropped,) = dropped_of(tmp_path, [pairs], 0.7)
    assert dropped == {2: Dropped("near_duplicate", 0, 0)}
    # Texts with few words in each part still have n-grams.
    assert min_hash(screened(("one two", "three four five")).document) is not None


def test_in_a_crowded_bucket_the_first_and_the_nearest_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "EARLIEST", 2)
    monkeypatch.setattr(duplicates, "NEAREST", 1)
    members = np.arange(10, 16)
    originals = np.full(20, -1, np.int64)
    pairs = {
        (int(later), int(earlier))
        for laters, earliers in duplicates._pairs(members, np.zeros(6, np.int64), originals)
        for later, earlier in zip(laters, earliers, strict=True)
    }
    expected = {(later, earlier) for later in range(11, 16) for earlier in {10, 11, later - 1} if earlier < later}
    assert pairs == expected


def test_a_min_hash_does_not_depend_on_the_pieces_of_the_text() -> None:
    """What keeps memory bounded: that of a text is the smallest of those of its stretches."""
    rng = random.Random(5)
    for count in (5, 6, 30, 500, 30_000):
        text = " ".join(words(rng, count))
        places = sorted(rng.randrange(len(text)) for _ in range(8))
        pieces = [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]
        one = min_hash(Document("a", 0, ((text,),)))
        other = min_hash(Document("a", 0, (pieces,)))
        assert one is not None
        assert np.array_equal(one, other)


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        bands, rows = bands_for(threshold)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= (0.95 if threshold > 0.1 else 0.9)
    assert bands_for(0.8) == (18, 7)


def test_a_signature_file_exists_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with SignatureWriter(tmp_path / "s.arrow", 0.8) as writer:
            writer.add(screened("some text"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_signatures_of_another_threshold_are_refused(tmp_path: Path) -> None:
    dropped_of(tmp_path, [["some text"]], 0.8)
    with pytest.raises(UserError, match="other settings"):
        find_duplicates([tmp_path / "signatures-0.arrow"], 0.7, tmp_path / "dropped.arrow")


def test_nothing_at_all_has_no_duplicates(tmp_path: Path) -> None:
    assert dropped_of(tmp_path, [[], []], 0.8) == [{}, {}]
    assert dropped_of(tmp_path, [], 0.8) == []


def test_a_dropped_document_becomes_a_rejection() -> None:
    rejection = Dropped("near_duplicate", 0, 0).rejection(screened("the text"))
    assert (rejection.reason, rejection.excerpt, rejection.is_fault) == ("near_duplicate", "the text", False)
