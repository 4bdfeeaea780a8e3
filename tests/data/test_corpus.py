"""A dataset opens in place, or says what is wrong with it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.run import BuildOptions, build
from mdseq.data.corpus import Corpus
from mdseq.data.format import MANIFEST_FILE, Manifest, token_dtype
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError

TEXTS = [f"river {number} " + "runs past the mill\n" * (number % 7 + 1) for number in range(60)]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_path: Path) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines)
    options = BuildOptions(
        tmp_path / "texts.jsonl",
        tmp_path / "dataset",
        tokenizer=tokenizer_path,
        valid_fraction=0.2,
        max_shard_tokens=400,
        workers=1,
    )
    build(options)
    return options.out


def first_shard(dataset: Path) -> Path:
    return dataset / "train-00000.arrow"


def test_documents_are_views_into_the_mapped_file(dataset: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus.open(dataset, "train")
    assert len(corpus.manifest.splits["train"].shards) > 1
    for document in range(corpus.num_documents):
        tokens = corpus.tokens(document)
        assert np.shares_memory(tokens, corpus.tokens(document))
        assert not tokens.flags.writeable
        assert tokens.dtype == np.uint16
        assert len(tokens) == corpus.length(document)
        assert (tokens[0], tokens[-1]) == (SpecialToken.BOS, SpecialToken.EOS)
        assert tokenizer.decode(tokens) in TEXTS
        np.testing.assert_array_equal(corpus.tokens(document, 2, 5), tokens[2:5])
        assert corpus.source(document) == "texts.jsonl"
    assert corpus.offsets[-1] == corpus.num_tokens == corpus.manifest.splits["train"].tokens
    assert np.all(corpus.target_starts == 1)


def test_splits_share_the_documents_out(dataset: Path, tokenizer: Tokenizer) -> None:
    splits = [Corpus.open(dataset, "train"), Corpus.open(dataset, "valid")]
    decoded = [tokenizer.decode(split.tokens(d)) for split in splits for d in range(split.num_documents)]
    assert sorted(decoded) == sorted(TEXTS)


def test_reading_needs_no_torch() -> None:
    modules = ", ".join(f"mdseq.data.{name}" for name in ("format", "tokenizer", "corpus", "packing", "order"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_truncated_shard(dataset: Path) -> None:
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-00000.arrow is damaged: it has .* bytes .*build the dataset again"):
        Corpus.open(dataset, "train")


def test_missing_shard(dataset: Path) -> None:
    first_shard(dataset).unlink()
    with pytest.raises(UserError, match=r"train-00000.arrow is damaged"):
        Corpus.open(dataset, "train")


@pytest.mark.parametrize("damage", [slice(0, 8), slice(-200, None)])
def test_damaged_header_or_footer(dataset: Path, damage: slice) -> None:
    path = first_shard(dataset)
    content = bytearray(path.read_bytes())
    content[damage] = bytes(len(content[damage]))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.arrow is damaged"):
        Corpus.open(dataset, "train", verify=True)


def test_one_changed_token_is_found_by_its_hash(dataset: Path) -> None:
    path = first_shard(dataset)
    content = path.read_bytes()
    position = content.index(Corpus.open(dataset, "train").tokens(0).tobytes())
    path.write_bytes(content[:position] + b"\x07" + content[position + 1 :])
    Corpus.open(dataset, "train")
    with pytest.raises(UserError, match=r"train-00000.arrow is damaged: its sha256"):
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
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "format version 9"),
        (lambda text: text.replace('"kind"', '"sort"'), "build the dataset again"),
        (
            lambda text: text.replace('"max_shard_tokens": 400', '"max_shard_tokens": 500'),
            "changed after the build",
        ),
        (lambda text: "[]", "format version None"),
    ],
)
def test_unusable_manifest(dataset: Path, change: object, complaint: str) -> None:
    path = dataset / MANIFEST_FILE
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(UserError, match=complaint):
        Manifest.load(dataset)


def test_empty_split(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document")
    build(BuildOptions(tmp_path / "one.txt", tmp_path / "dataset", tokenizer=tokenizer_path, workers=1))
    with pytest.raises(UserError, match="no documents in its 'valid' split"):
        Corpus.open(tmp_path / "dataset", "valid")


def test_dtype_is_the_narrowest_that_holds_every_id() -> None:
    assert [token_dtype(size) for size in (1, 65535, 65536, 65537)] == ["uint16"] * 3 + ["uint32"]
