"""An intact dataset passes, each kind of damage is named with its place, and a document can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_prep import audit as audit_module
from data_prep.audit import show, verify
from data_prep.picture import plot_stats
from data_prep.statistics import PartStatistics, length_edges, stats
from data_prep.vocabulary import train_vocabulary
from mdseq.data.format import (
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Kind,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    SplitOfSource,
    document_id,
    file_sha256,
    shard_schema,
    special_token_ids,
    token_dtype,
)
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError

HEADER = "# {path}\n"
BATCH_DOCUMENTS = 2


@dataclass(frozen=True)
class Row:
    """A row of a shard, right or wrong. `text_bytes` is what the manifest counts for it."""

    tokens: list[int]
    target_start: int
    document_id: bytes
    text_bytes: int
    source: str = "books"
    origin: str = "a.txt"
    row: int = 0


@pytest.fixture(scope="module")
def tokenizer_model() -> bytes:
    return train_vocabulary([f"def mill_{number}(river):\n    return river + {number}\n" for number in range(60)], 512)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: bytes) -> Tokenizer:
    return Tokenizer(tokenizer_model)


@pytest.fixture
def text_row(tokenizer: Tokenizer) -> Callable[..., Row]:
    def make(text: str, header: str = "", **others: Any) -> Row:
        ids = tokenizer.encode(header + text).tolist()
        tokens = [SpecialToken.BOS, *ids, SpecialToken.EOS]
        return Row(tokens, 1, document_id(text), len((header + text).encode()), **others)

    return make


@pytest.fixture
def pair_row(tokenizer: Tokenizer) -> Callable[..., Row]:
    def make(source: str, target: str, **others: Any) -> Row:
        given, wanted = tokenizer.encode(source).tolist(), tokenizer.encode(target).tolist()
        tokens = [SpecialToken.BOS, *given, SpecialToken.SEP, *wanted, SpecialToken.EOS]
        size = len((source + target).encode())
        return Row(tokens, len(given) + 2, document_id(source, target), size, **others)

    return make


Shards = dict[Split, dict[str, list[list[Row]]]]


@pytest.fixture
def write(tokenizer_model: bytes, tmp_path: Path) -> Callable[..., Path]:
    """Writes shards, given as lists of rows, by the format's definition, and a manifest to which they agree.

    `columns` replace those of the rows, and `changes` fields of the manifest.
    """

    def write_it(
        splits: Shards,
        kind: Kind = "text",
        header: str = "",
        columns: dict[str, pa.Array] | None = None,
        **changes: Any,
    ) -> Path:
        tokenizer = Tokenizer(tokenizer_model)
        (tmp_path / TOKENIZER_FILE).write_bytes(tokenizer_model)
        entries: dict[Split, SplitEntry] = {}
        for split in SPLITS:
            parts = {}
            for source, shards in splits.get(split, {}).items():
                written = [
                    write_shard(tmp_path / f"{split}-{source}-{number}.arrow", rows, columns or {}, tokenizer)
                    for number, rows in enumerate(shards)
                ]
                parts[source] = SplitOfSource(
                    documents=sum(entry.documents for entry in written),
                    tokens=sum(entry.tokens for entry in written),
                    text_bytes=sum(row.text_bytes for rows in shards for row in rows),
                    shards=tuple(written),
                )
            entries[split] = SplitEntry.combine(parts)
        names = sorted({source for parts in splits.values() for source in parts})
        kept = {
            name: sum(part.sources[name].documents for part in entries.values() if name in part.sources)
            for name in names
        }
        manifest = Manifest(
            kind=kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size),
            special_tokens=special_token_ids(),
            sources={
                name: SourceEntry(weight=None, path_header=header, read=kept[name] + 3, rejected={"empty": 3})
                for name in names
            },
            splits=entries,
        )
        rewrite_manifest(tmp_path, manifest.model_copy(update=changes))
        return tmp_path

    return write_it


def write_shard(path: Path, rows: list[Row], instead: dict[str, pa.Array], tokenizer: Tokenizer) -> ShardEntry:
    schema = shard_schema(token_dtype(tokenizer.vocab_size), tokenizer.fingerprint)
    sources, origins = (sorted({getattr(row, name) for row in rows}) for name in ("source", "origin"))
    with pa.ipc.new_file(str(path), schema) as writer:
        for first in range(0, len(rows), BATCH_DOCUMENTS):
            some = rows[first : first + BATCH_DOCUMENTS]
            columns = {
                "tokens": pa.array([row.tokens for row in some], type=schema.field("tokens").type),
                "target_start": pa.array([row.target_start for row in some], type=pa.int64()),
                "document_id": pa.array([row.document_id for row in some], type=pa.binary(16)),
                "source": encoded([row.source for row in some], sources),
                "origin": encoded([row.origin for row in some], origins),
                "row": pa.array([row.row for row in some], type=pa.int64()),
            }
            writer.write_batch(pa.RecordBatch.from_arrays([*(columns | instead).values()], schema=schema))
    tokens = sum(len(row.tokens) for row in rows)
    return ShardEntry(
        file=path.name, documents=len(rows), tokens=tokens, bytes=path.stat().st_size, sha256=file_sha256(path)
    )


def encoded(names: list[str], dictionary: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(map(dictionary.index, names), type=pa.int32()), dictionary)


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.signed().to_json())


@pytest.fixture(params=[3, 1 << 20], ids=["short stretches", "long stretches"])
def _stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "STRETCH_TOKENS", request.param)


TEXTS = ["def mill", "", "é\U0001f600 \u2581\n", "<s> return", "river + 7", "    return\n" * 20]


@pytest.mark.usefixtures("_stretches")
def test_intact_texts_pass(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    rows = [text_row(text, row=index) for index, text in enumerate(TEXTS)]
    code = [text_row(text, "# b.py\n", source="code", origin="b.py") for text in TEXTS[:3]]
    done: list[int] = []
    folder = write({"train": {"books": [rows[:5], rows[5:]]}, "test": {"books": [rows[:1]]}})
    assert verify(folder, done.append) == 7
    assert sum(done) == sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert verify(write({"train": {"code": [code]}}, header=HEADER)) == 3


@pytest.mark.usefixtures("_stretches")
def test_intact_pairs_pass(write: Callable[..., Path], pair_row: Callable[..., Row]) -> None:
    rows = [pair_row(text, text[::-1]) for text in TEXTS]
    assert verify(write({"valid": {"books": [rows[:1], rows[1:]]}}, kind="pair")) == 6


def with_token(row: Row, index: int, token: int) -> Row:
    tokens = row.tokens.copy()
    tokens[index] = token
    return replace(row, tokens=tokens)


FAULTS: dict[str, tuple[Callable[[Row], Row], str]] = {
    "pad inside": (lambda row: with_token(row, 2, SpecialToken.PAD), "its token 2 is 0, which cannot be there"),
    "bos inside": (lambda row: with_token(row, 3, SpecialToken.BOS), "its token 3 is 2, which cannot be there"),
    "no bos": (lambda row: with_token(row, 0, 300), "its token 0 is 300"),
    "no eos": (lambda row: with_token(row, -1, 300), "is 300, which cannot be there"),
    "sep for eos": (lambda row: with_token(row, -1, SpecialToken.SEP), "is 4, which cannot be there"),
    "id beyond the vocabulary": (lambda row: with_token(row, 2, 65_535), "its token 2 is 65535"),
    "target_start": (lambda row: replace(row, target_start=row.target_start + 1), "token|target_start"),
    "target_start beyond": (lambda row: replace(row, target_start=10**12), "target_start"),
    "target_start negative": (lambda row: replace(row, target_start=-1), "target_start"),
    "nothing in it": (lambda row: replace(row, tokens=[], target_start=1), "it has less than BOS"),
    "row": (lambda row: replace(row, row=-1), "its row is negative"),
    "text": (lambda row: replace(row, document_id=bytes(16)), "not the text that was hashed"),
}


@pytest.mark.usefixtures("_stretches")
@pytest.mark.parametrize("kind", ["text", "pair"])
@pytest.mark.parametrize(("spoil", "finding"), FAULTS.values(), ids=FAULTS)
def test_faults_of_documents_are_named(
    write: Callable[..., Path],
    text_row: Callable[..., Row],
    pair_row: Callable[..., Row],
    kind: Kind,
    spoil: Callable[[Row], Row],
    finding: str,
) -> None:
    def make(text: str, row: int) -> Row:
        return text_row(text, row=row) if kind == "text" else pair_row(text, "mill + mill", row=row)

    rows = [make("return river + 7", index) for index in range(5)]
    rows[3] = spoil(rows[3])
    folder = write({"train": {"books": [[make("def mill", 0)], rows]}}, kind=kind)
    with pytest.raises(UserError, match=rf"train-books-1.arrow: train document 4 \(a.txt, row -?\d\): .*({finding})"):
        verify(folder)


def test_separator_of_a_pair_stands_before_its_target(write: Callable[..., Path], pair_row: Callable[..., Row]) -> None:
    row = pair_row("def mill", "return")
    for index, token in ((row.target_start - 1, 300), (row.target_start, SpecialToken.SEP)):
        with pytest.raises(UserError, match=f"its token {index} is {token}"):
            verify(write({"train": {"books": [[with_token(row, index, token)]]}}, kind="pair"))


def test_header_is_no_part_of_the_text(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    without = text_row("return", source="books", origin="b.py")
    with pytest.raises(UserError, match=r"its text does not begin with '# b.py\\n'"):
        verify(write({"train": {"books": [[without]]}}, header=HEADER))


def test_source_column_is_checked(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    rows = [text_row("return"), text_row("return", source="code")]
    with pytest.raises(UserError, match="has documents of books, code"):
        verify(write({"train": {"books": [rows]}}))


def test_damaged_files_are_named(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    folder = write({"train": {"books": [[text_row("return")], [text_row("def mill")]]}})
    path = folder / "train-books-1.arrow"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1])
    with pytest.raises(UserError, match=r"train-books-1.arrow is damaged: it has .* bytes"):
        verify(folder)
    middle = len(intact) // 2
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    with pytest.raises(UserError, match=r"train-books-1.arrow is damaged: its sha256"):
        verify(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"train-books-1.arrow is damaged: .*No such file"):
        verify(folder)


def test_manifest_is_checked_against_itself_and_the_shards(
    write: Callable[..., Path], text_row: Callable[..., Row]
) -> None:
    shards: Shards = {"train": {"books": [[text_row("return")]]}}
    with pytest.raises(UserError, match="vocab_size, dtype or special_tokens"):
        verify(write(shards, vocab_size=511))
    with pytest.raises(UserError, match="records of books some are neither"):
        verify(write(shards, sources={"books": SourceEntry(weight=None, path_header="", read=7, rejected={})}))
    with pytest.raises(UserError, match="records of books some are neither"):
        verify(
            write(shards, sources={"books": SourceEntry(weight=None, path_header="", copies=2, read=1, rejected={})})
        )
    manifest = Manifest.load(write(shards))
    part = manifest.splits["train"].sources["books"]
    for change, finding in (
        ({"documents": 2}, "do not add up to its totals"),
        ({"text_bytes": 7}, "books has 6 bytes of text in train, not text_bytes = 7"),
    ):
        entry = SplitEntry.combine({"books": part.model_copy(update=change)})
        rewrite_manifest(
            tmp := write(shards), manifest.model_copy(update={"splits": {**manifest.splits, "train": entry}})
        )
        with pytest.raises(UserError, match=finding):
            verify(tmp)


def test_totals_of_a_split_are_checked(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    shards: Shards = {"train": {"books": [[text_row("return")]]}}
    folder = write(shards)
    manifest = Manifest.load(folder)
    too_many = manifest.splits["train"].model_copy(update={"text_bytes": 7})
    rewrite_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": too_many}}))
    with pytest.raises(UserError, match="the sources of train do not add up"):
        verify(folder)


NULL = pa.array([None], pa.int64())
NO_ORIGIN = pa.DictionaryArray.from_arrays(pa.array([7], pa.int32()), ["a.txt"], safe=False)


@pytest.mark.parametrize(
    ("columns", "finding"),
    [
        ({"row": NULL}, "column row has nulls"),
        ({"origin": NO_ORIGIN}, "record batch of document 0: .*Dictionary indices"),
    ],
)
def test_columns_that_break_their_type_are_named(
    write: Callable[..., Path], text_row: Callable[..., Row], columns: dict[str, pa.Array], finding: str
) -> None:
    with pytest.raises(UserError, match=finding):
        verify(write({"train": {"books": [[text_row("return")]]}}, columns=columns))


def test_tokenizer_must_be_that_of_the_manifest(write: Callable[..., Path], text_row: Callable[..., Row]) -> None:
    folder = write({"train": {"books": [[text_row("return")]]}})
    (folder / TOKENIZER_FILE).write_bytes(train_vocabulary(["another text altogether"] * 9, 512))
    with pytest.raises(UserError, match="not the tokenizer of the manifest"):
        verify(folder)


def test_only_a_sample_is_decoded(
    write: Callable[..., Path], text_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "ROUND_TRIP_DOCUMENTS", 3)
    rows = [
        replace(text_row("return"), document_id=bytes(16) if index % 3 else document_id("return")) for index in range(8)
    ]
    folder = write({"train": {"books": [rows[:2], rows[2:]]}})
    assert verify(folder) == 8  # documents 0, 3 and 6
    monkeypatch.setattr(audit_module, "ROUND_TRIP_DOCUMENTS", 4)
    with pytest.raises(UserError, match="document 2 "):
        verify(folder)  # documents 0, 2, 4 and 6


def test_show(write: Callable[..., Path], pair_row: Callable[..., Row], text_row: Callable[..., Row]) -> None:
    row = pair_row("def mill", "return é", origin="b.jsonl", row=1234)
    folder = write({"train": {"books": [[pair_row("a", "b")], [row]]}}, kind="pair")
    header, body = show(folder, "train", 1).split("\n", 1)
    assert body == "<BOS>def mill<SEP>return é<EOS>"
    assert header == (
        f"train document 1 of 2: books, b.jsonl, row 1,234; {len(row.tokens)} tokens, target from {row.target_start}; "
        f"id {document_id('def mill', 'return é').hex()}"
    )
    for document in (-1, 2):
        with pytest.raises(UserError, match=f"no train document {document}; allowed: 0 to 1"):
            show(folder, "train", document)
    with pytest.raises(UserError, match="no documents in its 'test' split"):
        show(folder, "test", 0)
    assert show(write({"test": {"books": [[text_row("river\n")]]}}), "test", 0).endswith("\n<BOS>river\n<EOS>")


def test_stats_count_what_is_there(
    write: Callable[..., Path], text_row: Callable[..., Row], tokenizer: Tokenizer
) -> None:
    rows = [text_row(text) for text in [*TEXTS, *["river"] * 14]]
    code = [text_row("\u2581", source="code")]
    books, held_out, other = stats(
        write({"train": {"books": [rows[:5], rows[5:]], "code": [code]}, "test": {"books": [rows[:1]]}})
    )
    assert [(part.split, part.source) for part in (books, held_out, other)] == [
        ("train", "books"),
        ("train", "code"),
        ("test", "books"),
    ]
    lengths = sorted(len(row.tokens) for row in rows)
    assert (books.documents, books.tokens) == (20, sum(lengths))
    assert books.text_bytes == sum(row.text_bytes for row in rows)
    assert books.byte_tokens == sum("<0x" in tokenizer._processor.IdToPiece(t) for row in rows for t in row.tokens)
    assert list(books.length_quantiles.values()) == [lengths[index] for index in (0, 1, 10, 18, 19)]
    assert books.length_histogram == tuple(np.histogram(lengths, length_edges())[0].tolist())
    assert sum(books.length_histogram) == 20
    assert held_out.byte_fallback == 3 / 5
    assert held_out.tokens_per_byte == 5 / 3


@pytest.mark.parametrize("num_sources", [1, 30])
@pytest.mark.filterwarnings("error")
def test_picture_of_few_and_of_many_parts(num_sources: int, tmp_path: Path) -> None:
    histogram = tuple(np.histogram([1, 5, 7_000_000], length_edges())[0].tolist())
    parts = [
        PartStatistics(split, f"source-{number}-" + "x" * number, 3, 7_000_006, 28_000_000, number, {}, histogram)
        for split in SPLITS
        for number in range(num_sources)
    ]
    plot_stats(parts, "many parts", tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
