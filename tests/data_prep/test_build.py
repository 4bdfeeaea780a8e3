"""A build gives the same bytes however it is run, loses nothing silently, and appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import audit, jobs, plan
from data_prep.readers import text
from mdseq.data.corpus import Corpus
from mdseq.data.format import Manifest, document_id
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError
from tests.data_prep.conftest import Build, contents, decoded, texts, write_files, write_jsonl

any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def rejected(manifest: Manifest) -> dict[str, int]:
    (source,) = manifest.sources.values()
    return source.rejected


class TestForm:
    def test_text(self, build_dataset: Build, tokenizer_path: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("past the mill\n")
        manifest = build_dataset(tmp_path / "a.txt", tmp_path / "out", "splits.valid_fraction=0")
        corpus = Corpus.open(tmp_path / "out", "train")
        body = Tokenizer.load(tokenizer_path).encode("past the mill\n")
        assert corpus.tokens(0).tolist() == [SpecialToken.BOS, *body, SpecialToken.EOS]
        assert corpus.target_start(0) == 1
        assert corpus.document_id(0) == document_id("past the mill\n")
        assert (corpus.source(0), corpus.origin(0), corpus.row(0)) == ("a", "a.txt", 0)
        assert manifest == corpus.manifest
        assert manifest.splits["train"].text_bytes == len("past the mill\n")

    def test_pair(self, build_dataset: Build, tokenizer_path: Path, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", [{"src": "old mill", "trg": "river"}])
        build_dataset(data, tmp_path / "out", "splits.valid_fraction=0")
        corpus = Corpus.open(tmp_path / "out", "train")
        tokenizer = Tokenizer.load(tokenizer_path)
        source, target = tokenizer.encode("old mill"), tokenizer.encode("river")
        form = [SpecialToken.BOS, *source, SpecialToken.SEP, *target, SpecialToken.EOS]
        assert corpus.tokens(0).tolist() == form
        assert corpus.target_start(0) == len(source) + 2
        assert corpus.document_id(0) == document_id("old mill", "river")
        assert corpus.manifest.kind == "pair"

    def test_fields_by_template(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "qa.jsonl", [{"q": "Where?", "context": ["By the mill."], "a": "mill"}])
        build_dataset(data, tmp_path / "out", source="{q}\n\n{context.0}", target="a")
        assert decoded(tmp_path / "out") == [("Where?\n\nBy the mill.", "mill")]

    def test_source_tree_with_and_without_header(self, build_dataset: Build, tmp_path: Path) -> None:
        (tmp_path / "tree" / "lib").mkdir(parents=True)
        (tmp_path / "tree" / "lib" / "mill.py").write_text("x = 1\n")
        with_header = build_dataset(tmp_path / "tree", tmp_path / "with", "splits.valid_fraction=0", format="code")
        without = build_dataset(
            tmp_path / "tree", tmp_path / "without", "splits.valid_fraction=0", format="code", path_header=""
        )
        assert decoded(tmp_path / "with") == [("# lib/mill.py\nx = 1\n",)]
        assert decoded(tmp_path / "without") == [("x = 1\n",)]
        ids = [corpus_ids(tmp_path / name) for name in ("with", "without")]
        assert ids[0] == ids[1], "a document is known by its content, not by where it stands"
        header_bytes = with_header.splits["train"].text_bytes - without.splits["train"].text_bytes
        assert header_bytes == len("# lib/mill.py\n")
        assert audit.verify(tmp_path / "with") == 1

    def test_several_sources(self, build_dataset: Build, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "novels.jsonl", texts(30))
        (tmp_path / "notes.txt").write_text("by the river")
        spec = tmp_path / "prep.toml"
        spec.write_text(
            '[[sources]]\npath = "novels.jsonl"\nweight = 3\n\n'
            '[[sources]]\nname = "own"\npath = "notes.txt"\nweight = 1\nsplit = "train"\n'
        )
        manifest = build_dataset(spec, tmp_path / "out", "splits.valid_fraction=0.3")
        assert {name: (source.weight, source.read) for name, source in manifest.sources.items()} == {
            "novels": (3.0, 30), "own": (1.0, 1),
        }  # fmt: skip
        assert manifest.splits["train"].sources["own"].documents == 1
        assert {name for split in manifest.splits.values() for name in split.sources} == {"novels", "own"}
        assert Corpus.open(tmp_path / "out", "train", source="own").origin(0) == "notes.txt"


def corpus_ids(folder: Path) -> set[bytes]:
    manifest = Manifest.load(folder)
    corpora = [Corpus.open(folder, split) for split, entry in manifest.splits.items() if entry.documents]
    return {corpus.document_id(document) for corpus in corpora for document in range(corpus.num_documents)}


class TestSameBytes:
    @pytest.mark.parametrize("workers", [2, 5])
    def test_from_any_number_of_workers(self, build_dataset: Build, tmp_path: Path, workers: int) -> None:
        data = write_files(tmp_path / "texts", [{"text": "{broken" * 9}, *texts(3000), {"body": "none"}])
        overrides = ("vocabulary.size=512", "splits.valid_fraction=0.1", "cleaning.exact_duplicates=drop")
        for count in (1, workers):
            manifest = build_dataset(data, tmp_path / f"out{count}", "shards.text_mb=0.001", *overrides, workers=count)
            assert len(manifest.splits["train"].sources["texts"].shards) == 8
        one, many = contents(tmp_path / "out1"), contents(tmp_path / f"out{workers}")
        assert one == many
        assert {"manifest.json", "plan.json", "tokenizer.model", "rejected.jsonl", "train-00000.arrow"} <= one.keys()

    def test_a_file_is_cut_into_shards_without_a_document_lost_or_doubled(
        self, build_dataset: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(text, "BLOCK_BYTES", 1000)
        monkeypatch.setattr(plan, "BLOCK_BYTES", 1000)
        data = write_jsonl(tmp_path / "texts.jsonl", texts(2000))
        build_dataset(data, tmp_path / "out", "shards.text_mb=0.01", "splits.valid_fraction=0")
        corpus = Corpus.open(tmp_path / "out", "train")
        assert len(corpus.manifest.splits["train"].sources["texts"].shards) > 10
        assert [corpus.row(document) for document in range(2000)] == list(range(2000))
        assert decoded(tmp_path / "out") == [(record["text"],) for record in texts(2000)]

    def test_a_second_build_does_nothing(
        self, build_dataset: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(20))
        first = build_dataset(data, tmp_path / "out")
        before = contents(tmp_path / "out")
        monkeypatch.setattr(jobs.ShardJobs, "encode", None)
        assert build_dataset(data, tmp_path / "out") == first
        assert contents(tmp_path / "out") == before

    def test_fingerprint_follows_content(self, build_dataset: Build, tmp_path: Path) -> None:
        def fingerprint(name: str, count: int, *overrides: str) -> str:
            folder = tmp_path / name
            folder.mkdir()
            return build_dataset(
                write_jsonl(folder / "texts.jsonl", texts(count)), folder / "out", *overrides
            ).fingerprint

        first = fingerprint("first", 20)
        assert fingerprint("again", 20) == first
        assert fingerprint("more", 21) != first
        assert fingerprint("other", 20, "splits.valid_fraction=0.4") != first


class TestNothingIsLost:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(written=st.lists(any_text, min_size=1, max_size=12))
    def test_documents_in_are_documents_out_and_rejections(
        self, build_dataset: Build, tmp_path_factory: pytest.TempPathFactory, written: list[str]
    ) -> None:
        folder = tmp_path_factory.mktemp("any")
        data = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in [*written, "mill"]])
        manifest = build_dataset(
            data, folder / "out", "cleaning.max_faulty_fraction=1", "cleaning.max_filtered_fraction=1"
        )
        kept = [text for text in [*written, "mill"] if text.strip()]
        assert sorted(text for (text,) in decoded(folder / "out")) == sorted(kept)
        assert sum(rejected(manifest).values()) == len(written) + 1 - len(kept)
        assert audit.verify(folder / "out") == len(kept)

    def test_bad_lines_are_counted_and_kept_aside(self, build_dataset: Build, tmp_path: Path) -> None:
        data = tmp_path / "texts.jsonl"
        lines = [json.dumps(record) for record in texts(30)]
        lines[4:4] = ["{broken", '{"body": "x"}']
        data.write_text("\n".join(lines))
        manifest = build_dataset(data, tmp_path / "out")
        assert rejected(manifest) == {"missing_field": 1, "not_json": 1}
        aside = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        common = {"source": "texts", "origin": "texts.jsonl", "is_fault": True}
        assert aside == [
            common | {"row": 4, "reason": "not_json", "excerpt": "{broken"},
            common | {"row": 5, "reason": "missing_field", "excerpt": '{"body": "x"}'},
        ]
        assert len(decoded(tmp_path / "out")) == 30

    def test_too_many_bad_lines_stop_the_build_which_goes_on_when_they_are_allowed(
        self, build_dataset: Build, tmp_path: Path
    ) -> None:
        data = tmp_path / "texts.jsonl"
        data.write_text('{"text": "a"}\n' * 8 + "{broken\n" * 2)
        with pytest.raises(
            UserError, match=r"2 of 10 records .* 10%.*2 not_json\n  texts.jsonl, row 8: not_json: '{broken'"
        ):
            build_dataset(data, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        build_dataset(data, tmp_path / "out", "cleaning.max_faulty_fraction=0.5")
        assert len(decoded(tmp_path / "out")) == 8
        assert not (tmp_path / "out.partial").exists()

    def test_filters_count_apart_from_faults(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "short"}] * 8 + [{"text": "long enough"}] * 2)
        with pytest.raises(
            UserError, match=r"8 of 10 records were set aside by filters, .* 50% that cleaning.max_filtered"
        ):
            build_dataset(data, tmp_path / "out", "cleaning.min_characters=6", "cleaning.max_filtered_fraction=0.5")
        manifest = build_dataset(data, tmp_path / "out", "cleaning.min_characters=6")
        assert rejected(manifest) == {"too_short": 8}

    def test_no_document_at_all(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", [{"text": " "}])
        with pytest.raises(UserError, match="no document in 1 files: 1 empty"):
            build_dataset(data, tmp_path / "out", "cleaning.max_filtered_fraction=1", "cleaning.max_faulty_fraction=1")

    def test_duplicates(self, build_dataset: Build, tmp_path: Path) -> None:
        twice = [*texts(20), *texts(20)]
        data = write_jsonl(tmp_path / "texts.jsonl", twice)
        manifest = build_dataset(data, tmp_path / "out", "cleaning.exact_duplicates=drop", workers=2)
        assert rejected(manifest) == {"exact_duplicate": 20}
        assert sorted(text for (text,) in decoded(tmp_path / "out")) == sorted(record["text"] for record in texts(20))

    def test_evaluation_text_is_kept_out(self, build_dataset: Build, tmp_path: Path) -> None:
        words = [f"word{number}" for number in range(40)]
        evaluation = write_jsonl(tmp_path / "test.jsonl", [{"src": " ".join(words[:20]), "trg": "mill"}])
        data = write_jsonl(
            tmp_path / "texts.jsonl", [{"text": "Before " + " ".join(words[2:17])}, {"text": " ".join(words[20:])}]
        )
        manifest = build_dataset(data, tmp_path / "out", f"cleaning.evaluation=['{evaluation}']")
        assert rejected(manifest) == {"contaminated": 1}


class TestSplits:
    def test_are_stable_when_data_grows(self, build_dataset: Build, tmp_path: Path) -> None:
        held_out = []
        for count in (300, 400):
            data = write_jsonl(tmp_path / f"texts{count}.jsonl", texts(count))
            fractions = ("splits.valid_fraction=0.2", "splits.test_fraction=0.1")
            build_dataset(data, tmp_path / f"out{count}", *fractions)
            held_out.append([set(decoded(tmp_path / f"out{count}", split)) for split in ("train", "valid", "test")])
        for small, large in zip(*held_out, strict=True):
            assert small <= large
        assert 40 < len(held_out[0][1]) < 80
        assert 15 < len(held_out[0][2]) < 45

    def test_by_the_names_of_files(self, build_dataset: Build, tmp_path: Path) -> None:
        for name in ("train-00", "train-01", "valid", "test"):
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"mill of {name}"}])
        manifest = build_dataset(tmp_path, tmp_path / "out", split="name")
        assert {split: entry.documents for split, entry in manifest.splits.items()} == {
            "train": 2,
            "valid": 1,
            "test": 1,
        }
        assert decoded(tmp_path / "out", "valid") == [("mill of valid",)]


class TestRefusals:
    def test_a_changed_input_or_option_is_named(self, build_dataset: Build, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        write_jsonl(tmp_path / "data" / "a.jsonl", texts(20))
        write_jsonl(tmp_path / "data" / "b.jsonl", [{"nothing": 1}] * 20)
        for out in ("unfinished", "finished"):
            with pytest.raises(UserError, match="cannot be read"):
                build_dataset(tmp_path / "data", tmp_path / out)
        build_dataset(tmp_path / "data", tmp_path / "finished", "cleaning.max_faulty_fraction=1")

        write_jsonl(tmp_path / "data" / "b.jsonl", texts(21))
        (tmp_path / "data" / "a.jsonl").rename(tmp_path / "data" / "c.jsonl")
        for out in ("unfinished", "finished"):
            with pytest.raises(UserError) as error:
                build_dataset(tmp_path / "data", tmp_path / out, "splits.valid_fraction=0.2")
            message = str(error.value)
            assert "splits.valid_fraction: 0.01 then, 0.2 now" in message
            assert f"{tmp_path / 'data' / 'a.jsonl'}: gone" in message
            assert f"{tmp_path / 'data' / 'c.jsonl'}: new" in message
            assert f"{tmp_path / 'data' / 'b.jsonl'}: its content has changed" in message

    def test_a_file_that_is_only_touched_has_not_changed(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(20))
        build_dataset(data, tmp_path / "out")
        before = contents(tmp_path / "out")
        data.touch()
        build_dataset(data, tmp_path / "out")
        assert contents(tmp_path / "out") == before

    def test_input_that_changes_meanwhile(
        self, build_dataset: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(20))
        real = jobs._SplitWriters.write

        def write_while_the_file_grows(writers: jobs._SplitWriters) -> object:
            write_jsonl(data, texts(25))
            return real(writers)

        monkeypatch.setattr(jobs._SplitWriters, "write", write_while_the_file_grows)
        with pytest.raises(UserError, match=r"texts.jsonl has changed since the build was planned"):
            build_dataset(data, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_is_there_is_never_overwritten(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        with pytest.raises(UserError, match=r"exists and is never overwritten; remove it"):
            build_dataset(data, tmp_path / "out")
        assert contents(tmp_path / "out") == {"thesis.tex": b"mine"}

    def test_unwritable_output(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
        with pytest.raises(UserError, match="cannot write OUT"):
            build_dataset(data, data / "out")

    def test_texts_and_pairs_do_not_mix(self, build_dataset: Build, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
        write_jsonl(tmp_path / "b.jsonl", [{"src": "a", "trg": "b"}])
        with pytest.raises(UserError, match=r"a is of texts, b is of pairs.*; build two"):
            build_dataset([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "out")

    def test_records_without_a_known_field(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", [{"title": "a", "body": "b"}])
        with pytest.raises(
            UserError, match=r"records have the fields title, body, none of them `text`.*sources.texts.text"
        ):
            build_dataset(data, tmp_path / "out")

    def test_a_folder_in_the_way_is_left_alone(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
        with pytest.raises(UserError, match=r"out.partial holds files that are not a build's"):
            build_dataset(data, tmp_path / "out")
        assert contents(tmp_path / "out.partial") == {"thesis.tex": b"mine"}

    def test_two_builds_of_one_dataset_at_once(self, build_dataset: Build, tmp_path: Path) -> None:
        import fcntl

        data = write_jsonl(tmp_path / "texts.jsonl", texts(5))
        (tmp_path / "out.partial" / "work").mkdir(parents=True)
        being_written = tmp_path / "out.partial" / ".train-00000.arrow.node-1.tmp"
        being_written.touch()
        with (tmp_path / "out.partial" / "work" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another build is writing"):
                build_dataset(data, tmp_path / "out")
        assert being_written.exists()
