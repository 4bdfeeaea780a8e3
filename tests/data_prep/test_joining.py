"""Pairs that become one lose nothing, stay within their limit, and have other neighbours in each copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import audit, jobs
from data_prep.documents import Document, Screened
from data_prep.joining import JOINT, as_one, groups
from mdseq.data.format import Split, document_id
from mdseq.errors import UserError
from tests.data_prep.conftest import Build, contents, decoded, write_files, write_jsonl

Pair = tuple[str, str]
Pairs = list[tuple[Split, str, str]]

PAIRS = [{"src": f"source {number}", "trg": f"target of {number}"} for number in range(7)]
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
some_pairs = st.lists(st.tuples(st.sampled_from(["train", "train", "valid", "test"]), some_text, some_text))


def screened(number: int, source: str, target: str) -> Screened:
    """A pair whose parts arrive in pieces."""
    parts = tuple((text[:1], text[1:]) for text in (source, target))
    return Screened(
        Document(f"file{number}", number, parts), document_id(source, target), len((source + target).encode())
    )


def texts(document: Screened) -> Pair:
    source, target = ("".join(part) for part in document.document.parts)
    return source, target


def joins(
    pairs: list[tuple[Split, str, str]], size: int, limit: int = 0, copy: int = 0
) -> list[tuple[Split, Screened]]:
    documents = [(split, screened(number, *texts)) for number, (split, *texts) in enumerate(pairs)]
    return [(split, as_one(group)) for split, group in groups(documents, size, limit, copy)]


@given(pairs=some_pairs, size=st.integers(1, 4), limit=st.integers(0, 40), copy=st.integers(0, 5))
def test_nothing_is_lost_and_limits_hold(pairs, size, limit, copy):
    found = joins(pairs, size, limit, copy)
    for split in ("valid", "test"):
        assert [texts(one) for kind, one in found if kind == split] == [(s, t) for kind, s, t in pairs if kind == split]

    left = [(number, source, target) for number, (kind, source, target) in enumerate(pairs) if kind == "train"]
    for document in (one for kind, one in found if kind == "train"):
        count = next(count for count in range(1, len(left) + 1) if joined_texts(left[:count]) == texts(document))
        (group, left), characters = (left[:count], left[count:]), sum(map(len, texts(document)))
        assert count <= size
        assert not limit or count == 1 or characters - 2 * (count - 1) * len(JOINT) <= limit
        assert document.document_id == document_id(*texts(document))
        assert document.text_bytes == len("".join(texts(document)).encode())
        assert (document.document.origin, document.document.row) == (f"file{group[0][0]}", group[0][0])
    assert left == []


@given(lengths=st.lists(st.integers(1, 12), max_size=30), size=st.integers(2, 4), limit=st.integers(0, 30))
def test_no_two_copies_have_a_whole_group_in_common(lengths, size, limit):
    """Wherever a long document has cut a group."""
    pairs: Pairs = [("train", "s" * length, f"t{number}") for number, length in enumerate(lengths)]
    copies = [[texts(one)[1] for _, one in joins(pairs, size, limit, copy)] for copy in range(size)]
    whole = [target for copy in copies for target in copy if target.count("t") == size]
    assert len(whole) == len(set(whole))


def joined_texts(group: list[tuple[int, str, str]]) -> Pair:
    return JOINT.join(source for _, source, _ in group), JOINT.join(target for _, _, target in group)


def test_those_that_follow_each_other_become_one_and_others_in_each_copy():
    pairs: Pairs = [("train", f"s{number}", f"t{number}") for number in range(5)]
    sources = {copy: [texts(one)[0] for _, one in joins(pairs, size=2, copy=copy)] for copy in range(3)}
    assert sources[0] == sources[2] == ["s0 s1", "s2 s3", "s4"]
    assert sources[1] == ["s0", "s1 s2", "s3 s4"]
    assert [texts(one)[1] for _, one in joins(pairs, size=3)] == ["t0 t1 t2", "t3 t4"]


def test_a_long_one_stands_by_itself():
    lengths = [3, 3, 30, 3, 3, 3]
    pairs: Pairs = [("train", "s" * length, "t") for length in lengths]
    assert [len(texts(one)[0]) for _, one in joins(pairs, size=2, limit=10)] == [7, 30, 3, 7]


class TestBuild:
    OPTIONS = ("sources.0.split=train", "sources.0.joined=2")

    def test_a_dataset_holds_what_was_joined(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS, {"src": "no target"}])
        options = (*self.OPTIONS, "sources.0.copies=2", "sources.0.sampling=0.3", "cleaning.max_faulty_fraction=0.5")
        manifest = build_dataset(data, tmp_path / "out", *options)
        found = decoded(tmp_path / "out")
        once = [("source 0 source 1", "target of 0 target of 1"), ("source 6", "target of 6")]
        assert [found[0], found[3]] == once
        assert [text[0] for text in found[4:]] == ["source 0", *(f"source {n} source {n + 1}" for n in (1, 3, 5))]
        source = manifest.sources["pairs"]
        assert (source.read, source.copies, source.merged, source.rejected) == (8, 2, 6, {"missing_field": 1})
        assert audit.verify(tmp_path / "out") == len(found) == 8

    def test_what_is_held_out_is_as_it_was(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(
            tmp_path / "pairs.jsonl", [{"src": f"s{number}", "trg": f"t{number}"} for number in range(80)]
        )
        held_out = "splits.valid_fraction=0.3"
        plain = build_dataset(data, tmp_path / "plain", held_out)
        manifest = build_dataset(data, tmp_path / "out", held_out, "sources.0.joined=3")
        assert decoded(tmp_path / "out", "valid") == decoded(tmp_path / "plain", "valid")
        kept = plain.splits["train"].documents
        assert manifest.splits["train"].documents == -(-kept // 3)
        assert manifest.sources["pairs"].merged == kept - manifest.splits["train"].documents
        words = [" ".join(part) for part in zip(*decoded(tmp_path / "plain", "train"), strict=True)]
        assert [" ".join(part) for part in zip(*decoded(tmp_path / "out", "train"), strict=True)] == words

    def test_a_limit_keeps_rows_long_enough(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
        for limit in (60, 10):
            build_dataset(data, tmp_path / str(limit), *self.OPTIONS, f"sources.0.joined_characters={limit}")
        assert len(decoded(tmp_path / "60")) == 4
        assert decoded(tmp_path / "10") == [(pair["src"], pair["trg"]) for pair in PAIRS]

    def test_same_bytes_from_any_number_of_workers(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_files(tmp_path / "pairs", PAIRS * 300)
        for count in (1, 3):
            options = (*self.OPTIONS, "shards.text_mb=0.001", "sources.0.copies=2")
            manifest = build_dataset(data, tmp_path / f"out{count}", *options, workers=count)
            assert len(manifest.splits["train"].sources["pairs"].shards) == 8
        assert contents(tmp_path / "out1") == contents(tmp_path / "out3")

    def test_what_is_lost_is_noticed(
        self, build_dataset: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode = jobs._SplitWriters._encode

        def lossy(self, split, screened, copy):
            if screened.document.row != 4:
                encode(self, split, screened, copy)

        monkeypatch.setattr(jobs._SplitWriters, "_encode", lossy)
        with pytest.raises(AssertionError, match="documents of pairs are lost"):
            build_dataset(write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out", *self.OPTIONS)

    def test_a_limit_without_joining_is_refused(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
        with pytest.raises(UserError, match=r"joined_characters = 9 limits what is joined.*set joined = 2"):
            build_dataset(data, tmp_path / "out", "sources.0.joined_characters=9")

    def test_dialogues_are_not_joined(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "talks.jsonl", [{"turns": [["a", "hello"], ["b", "bye"]]}])
        turns = ("sources.0.turns=turns", "sources.0.last_turn_is_target=true")
        with pytest.raises(UserError, match="joined = 2 is for pairs of source and target, not for turns"):
            build_dataset(data, tmp_path / "out", *turns, *self.OPTIONS)

    def test_texts_are_not_joined(self, build_dataset: Build, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("past the mill\n")
        with pytest.raises(UserError, match=r"sources\.a\.joined = 2: only pairs are joined"):
            build_dataset(tmp_path / "a.txt", tmp_path / "out", "sources.0.joined=2")
