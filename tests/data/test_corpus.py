"""A dataset opens in place, or says what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data import corpus as corpus_module
from mdseq.data.corpus import Corpus
from mdseq.data.format import MANIFEST_FILE, Manifest, token_dtype
from mdseq.errors import UserError
from tests.data.datasets import ORIGIN, Shard, document_id, write_dataset

# Two sources with shards of several batches; the tokens count from 0 through all of them.
LENGTHS = {"novels": [[4, 7, 2, 9, 3], [5, 2]], "letters": [[3], [6, 2, 8, 4]]}
FLAT_LENGTHS = [length for shards in LENGTHS.values() for shard in shards for length in shard]
STARTS = [1 + length // 3 for length in FLAT_LENGTHS]
NUM_TOKENS = sum(FLAT_LENGTHS)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    tokens, documents = np.arange(NUM_TOKENS, dtype=np.uint16), 0
    sources: dict[str, list[Shard]] = {}
    for source, shards in LENGTHS.items():
        for lengths in shards:
            part, tokens = tokens[: sum(lengths)], tokens[sum(lengths) :]
            starts = STARTS[documents : documents + len(lengths)]
            sources.setdefault(source, []).append(Shard(part, lengths, starts))
            documents += len(lengths)
    valid = {"letters": [Shard(np.arange(100, 103, dtype=np.uint16), [3])]}
    return write_dataset(tmp_path / "data", {"train": sources, "valid": valid}, documents_per_batch=2)


def first_shard(dataset: Path) -> Path:
    return dataset / "train-novels-00000.arrow"


def test_documents_are_views_into_the_mapped_file(dataset: Path) -> None:
    corpus = Corpus.open(dataset, "train", verify=True)
    assert (corpus.num_documents, corpus.num_tokens) == (len(FLAT_LENGTHS), NUM_TOKENS)
    assert corpus.sources == {"novels": range(0, 7), "letters": range(7, 12)}
    position = 0
    for document, length in enumerate(FLAT_LENGTHS):
        tokens = corpus.tokens(document)
        assert tokens.tolist() == list(range(position, position + length))
        assert np.shares_memory(tokens, corpus.tokens(document))
        assert not tokens.flags.writeable
        assert tokens.dtype == np.uint16
        assert corpus.tokens(document, 1, 3).tolist() == tokens[1:3].tolist()
        assert corpus.length(document) == length
        assert corpus.target_start(document) == STARTS[document]
        assert corpus.source(document) == ("novels" if document < 7 else "letters")
        assert corpus.origin(document) == ORIGIN
        position += length
    assert [corpus.row(document) for document in range(12)] == [0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3]
    assert corpus.document_id(8) == document_id(dataset / "train-letters-00001.arrow", 0)


def test_many_at_once(dataset: Path) -> None:
    corpus = Corpus.open(dataset, "train")
    edges = np.cumsum([0, *FLAT_LENGTHS])
    assert corpus.lengths().tolist() == FLAT_LENGTHS
    documents = np.array([11, 0, 7, 7, 3, 6])
    begins, ends = corpus.extents(documents)
    assert begins.tolist() == edges[documents].tolist()
    assert ends.tolist() == edges[documents + 1].tolist()
    assert corpus.target_starts(documents).tolist() == [STARTS[document] for document in documents]
    positions = np.arange(NUM_TOKENS)[::-1]
    found, offsets = corpus.locate(positions)
    assert (edges[found] + offsets).tolist() == positions.tolist()
    assert np.all(positions < edges[found + 1])


@given(st.data())
def test_any_stretch_of_the_stream(corpus_of: Any, data: st.DataObject) -> None:
    corpus = corpus_of(FLAT_LENGTHS, documents_per_shard=4, documents_per_batch=2)
    for _ in range(4):  # in any order: the corpus remembers where it has just been
        first = data.draw(st.integers(0, NUM_TOKENS))
        out = np.empty(data.draw(st.integers(0, NUM_TOKENS - first)), dtype=np.int64)
        corpus.read(first, out)
        assert out.tolist() == list(range(first, first + len(out)))


def test_one_source(dataset: Path) -> None:
    corpus = Corpus.open(dataset, "train", source="letters")
    assert corpus.sources == {"letters": range(0, 5)}
    assert corpus.tokens(0).tolist() == [32, 33, 34]
    assert corpus.lengths().tolist() == FLAT_LENGTHS[7:]
    with pytest.raises(UserError, match=r"no source 'novels' in its 'valid' split; allowed: letters"):
        Corpus.open(dataset, "valid", source="novels")


def test_a_shard_is_mapped_when_it_is_first_touched(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[str] = []
    map_shard = corpus_module.map_shard
    monkeypatch.setattr(
        corpus_module, "map_shard", lambda path, *rest: mapped.append(path.name) or map_shard(path, *rest)
    )
    corpus = Corpus.open(dataset, "train")
    assert mapped == []
    for _ in range(2):
        corpus.tokens(9)
        corpus.read(NUM_TOKENS - 3, np.empty(3))
        assert mapped == ["train-letters-00001.arrow"]


def test_two_threads_read_at_once(dataset: Path) -> None:
    corpus = Corpus.open(dataset, "train")
    failures: list[str] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(2000):
            first = int(rng.integers(NUM_TOKENS - 10))
            out = np.empty(10, dtype=np.int64)
            corpus.read(first, out)
            if out[0] != first or out[-1] != first + 9:
                failures.append(f"{first}: {out}")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reading_needs_no_torch() -> None:
    names = ("format", "tokenizer", "shard", "corpus", "best_fit", "packing", "order", "mixture")
    modules = ", ".join(f"mdseq.data.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_truncated_shard(dataset: Path) -> None:
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000.arrow is damaged: it has .* bytes .*build the dataset again"):
        Corpus.open(dataset, "train")


def test_missing_shard(dataset: Path) -> None:
    first_shard(dataset).unlink()
    with pytest.raises(UserError, match=r"00000.arrow is damaged: .*No such file"):
        Corpus.open(dataset, "train")


def test_damaged_footer(dataset: Path) -> None:
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    corpus = Corpus.open(dataset, "train")
    assert corpus.tokens(6).tolist() == [30, 31]  # other shards are none the worse
    with pytest.raises(UserError, match=r"train-novels-00000.arrow is damaged"):
        corpus.tokens(0)
    with pytest.raises(UserError, match=r"train-novels-00000.arrow is damaged"):
        Corpus.open(dataset, "train", verify=True)


def test_offsets_that_lead_astray(dataset: Path) -> None:
    path = first_shard(dataset)
    offsets = np.array([0, 4, 11], dtype=np.int64).tobytes()  # of the first batch
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 14, 11], dtype=np.int64).tobytes()))
    with pytest.raises(UserError, match=r"is damaged: its document offsets are not in order"):
        Corpus.open(dataset, "train").length(0)


def test_a_shard_of_another_dataset(dataset: Path, tmp_path: Path) -> None:
    """Of the right size, but with other documents in it."""
    tokens = np.arange(25, dtype=np.uint16)
    other = write_dataset(
        tmp_path / "other", {"train": {"novels": [Shard(tokens, [25])] * 2}}, documents_per_batch=2
    ) / "train-novels-00000.arrow"  # fmt: skip
    content = json.loads((dataset / MANIFEST_FILE).read_text())
    content["splits"]["train"]["sources"]["novels"]["shards"][0]["bytes"] = other.stat().st_size
    (dataset / MANIFEST_FILE).write_text(json.dumps(content))
    first_shard(dataset).write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"it holds 1 documents and 25 tokens; the manifest says 5 and 25"):
        Corpus.open(dataset, "train").length(0)


def test_one_changed_token_is_found_by_its_hash(dataset: Path) -> None:
    path = first_shard(dataset)
    content = path.read_bytes()
    position = content.index(Corpus.open(dataset, "train").tokens(0).tobytes())
    path.write_bytes(content[:position] + b"\x07" + content[position + 1 :])
    assert Corpus.open(dataset, "train").tokens(0)[0] == 7
    with pytest.raises(UserError, match=r"00000.arrow is damaged: its sha256"):
        Corpus.open(dataset, "train", verify=True)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset folder .*make prep"):
        Manifest.load(tmp_path / "absent")
    with pytest.raises(UserError, match="not a dataset"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[:-20], "not valid JSON"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 9'), "format version 9"),
        (lambda text: text.replace('"kind"', '"sort"'), "build the dataset again"),
        (lambda text: text.replace('"weight": null', '"weight": 2.0'), "changed after the build"),
        (lambda text: "[]", "format version None"),
    ],
)
def test_unusable_manifest(dataset: Path, change: Callable[[str], str], complaint: str) -> None:
    path = dataset / MANIFEST_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=complaint):
        Manifest.load(dataset)


def test_empty_split(dataset: Path) -> None:
    with pytest.raises(UserError, match="no documents in its 'test' split"):
        Corpus.open(dataset, "test")


def test_dtype_is_the_narrowest_that_holds_every_id() -> None:
    assert [token_dtype(size) for size in (1, 65535, 65536, 65537)] == ["uint16"] * 3 + ["uint32"]
