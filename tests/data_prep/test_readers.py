"""Every kind of file gives its records once, however it is cut into stretches, and every fault in its place."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.documents import Document, Rejection
from data_prep.readers import files, text
from data_prep.readers.base import EXCERPT_CHARACTERS, ReadOptions, Stretch
from data_prep.readers.registry import first_record, reader_of
from data_prep.sources import FileFormat
from data_prep.templates import RecordTemplate
from mdseq.errors import UserError

TEXT = RecordTemplate.of("text", "", "", "", "", False)
PAIR = RecordTemplate.of("", "src", "trg", "", "", False)


def options(template: RecordTemplate = TEXT, max_record_bytes: int = 1_000_000, header: str = "") -> ReadOptions:
    return ReadOptions(template, header, max_record_bytes)


def whole(path: Path, format: FileFormat, given: ReadOptions | None = None) -> list[Document | Rejection]:
    given = given or options()
    survey = reader_of(format).survey(path, given.max_record_bytes)
    return list(reader_of(format).read(path, path.name, Stretch(0, survey.units), given))


def plain(items: list[Document | Rejection]) -> list[tuple[int, tuple[str, ...] | str]]:
    """(row, texts) of a document, (row, reason) of a rejection."""
    return [
        (item.row, item.reason if isinstance(item, Rejection) else tuple("".join(part) for part in item.parts))
        for item in items
    ]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


class TestJsonLines:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (b'{"text": "a\\n b"}', ("a\n b",)),
            (b'{"text": "a\\u0000b"}', ("a\0b",)),
            (b'{"text": "a"', "not_json"),
            (b"[" * 100_000, "not_json"),
            (b'{"text": ' * 100_000, "not_json"),
            (b'{"text": ' + b"9" * 5000 + b"}", "not_json"),
            (b'{"text": "\xff"}', "not_utf8"),
            (b'["a"]', "not_an_object"),
            (b'{"body": "a"}', "missing_field"),
            (b'{"text": 3}', "not_a_string"),
            (b'{"text": null}', "missing_field"),
            (b'{"text": "' + b"x" * 1_000_000 + b'"}', "too_large"),
            (json.dumps({"text": "a"} | {f"f{i}": i for i in range(50_000)}).encode(), ("a",)),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_record(self, tmp_path: Path, line: bytes, expected: tuple[str, ...] | str) -> None:
        path = tmp_path / "records.jsonl"
        path.write_bytes(b"\n" + line + b'\r\n{"text": "last"}')
        first, last = whole(path, "jsonl")
        assert plain([first, last]) == [(1, expected), (2, ("last",))]
        if isinstance(first, Rejection):
            assert len(first.excerpt) <= EXCERPT_CHARACTERS
            first.excerpt.encode()

    def test_pairs_and_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"src": "a", "trg": "b", "id": 3}\n{"src": "a"}\n')
        assert plain(whole(path, "jsonl", options(PAIR))) == [(0, ("a", "b")), (1, "missing_field")]

    def test_first_record(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('broken\n[]\n{"b": 1}\n')
        assert first_record("jsonl", path) == {"b": 1}


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\n\n  two \r\n\xff\nthree")
    assert plain(whole(path, "lines")) == [(0, ("one",)), (2, ("  two ",)), (3, "not_utf8"), (4, ("three",))]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same forty rows, one of them null, as Parquet, as an Arrow file and as an Arrow stream."""
    folder = tmp_path_factory.mktemp("tables")
    texts = [None if row == 7 else f"text {row}" for row in range(40)]
    table = pa.table({"id": list(range(40)), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=15)
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=9)
    return sorted(folder.iterdir())


class TestStretches:
    """A file cut anywhere gives the records of the whole file, with their rows."""

    @given(lines=st.lists(st.sampled_from([b"", b"a", b"bb", b"c" * 9, b"\r"]), max_size=30), end=st.booleans())
    def test_lines(self, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bool) -> None:
        path = tmp_path_factory.mktemp("lines") / "lines.txt"
        path.write_bytes(b"\n".join(lines) + b"\n" * end)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "BLOCK_BYTES", 4)
            survey = reader_of("lines").survey(path, 100)
            pieces = []
            for block, row in enumerate(survey.lines_before):
                stretch = Stretch(4 * block, min(4 * block + 4, survey.units), row)
                pieces += list(reader_of("lines").read(path, "lines.txt", stretch, options()))
        assert plain(pieces) == plain(whole(path, "lines"))
        assert len(pieces) <= survey.records

    @pytest.mark.parametrize("compression", COMPRESSORS)
    @pytest.mark.parametrize("format", ["jsonl", "csv"])
    def test_compressed(self, tmp_path: Path, format: FileFormat, compression: str) -> None:
        texts = [f'text {number}\nsecond line, "quoted"' * (number % 5 + 1) for number in range(2000)]
        path = tmp_path / f"a.{format}{compression}"
        plain_path = tmp_path / "plain"
        with plain_path.open("w", newline="") as file:
            if format == "csv":
                writer = csv.writer(file)
                writer.writerows([["id", "text"], *([number, text] for number, text in enumerate(texts))])
            else:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        path.write_bytes(COMPRESSORS[compression](plain_path.read_bytes()))
        survey = reader_of(format).survey(path, 1_000_000)
        assert survey.text_bytes == plain_path.stat().st_size
        cut = survey.units // 3 if format == "csv" else 0
        stretches = [Stretch(0, cut), Stretch(cut, survey.units)] if cut else [Stretch(0, survey.units)]
        items = [item for stretch in stretches for item in reader_of(format).read(path, path.name, stretch, options())]
        assert plain(items) == [(number, (text,)) for number, text in enumerate(texts)]

    @given(st.lists(st.integers(0, 40), max_size=4))
    def test_tables(self, tables: list[Path], cuts: list[int]) -> None:
        for path in tables:
            format: FileFormat = "parquet" if path.suffix == ".parquet" else "arrow"
            edges = [0, *sorted(cuts), 40]
            items = []
            for start, stop in pairwise(edges):
                items += list(reader_of(format).read(path, path.name, Stretch(start, stop), options()))
            assert plain(items) == [(row, ("missing_field" if row == 7 else (f"text {row}",))) for row in range(40)]


class TestCsv:
    def test_faults(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes(b'text,n\n"a\nb",1\nonly\n\n"x"y,2\n\xff,3\nc\0d,4\n')
        assert plain(whole(path, "csv")) == [
            (0, ("a\nb",)), (1, "wrong_number_of_fields"), (3, "not_csv"), (4, "not_utf8"), (5, ("c\0d",)),
        ]  # fmt: skip

    def test_many_fields_and_tabs(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tsv"
        names = [f"f{number}" for number in range(100_000)]
        path.write_text("\t".join(["text", *names]) + "\n" + "\t".join(["hi", *names]) + "\n")
        assert plain(whole(path, "csv")) == [(0, ("hi",))]
        assert first_record("csv", path)["text"] == "hi"  # type: ignore[index]

    def test_a_quote_that_is_never_closed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('text\n"begins' + "x" * 5000)
        assert plain(whole(path, "csv")) == [(0, "not_csv")]
        with pytest.raises(UserError, match=r"a.csv has a field of more than 0.001 MB, or a quote"):
            whole(path, "csv", options(max_record_bytes=1000))


class TestWholeFiles:
    def test_text_is_exact(self, tmp_path: Path) -> None:
        text = "\ufeffline\r\n\n  indented\ttab \0\n"
        for suffix, compress in COMPRESSORS.items():
            path = tmp_path / f"a.txt{suffix}"
            path.write_bytes(compress(text.encode()))
            (document,) = whole(path, "text", options(header="# {path}\n"))
            assert isinstance(document, Document)
            for _ in range(2):  # a part can be walked again
                assert "".join(document.parts[0]) == text
            assert document.header == ""

    def test_large_files_are_read_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text, "LARGE_FILE_BYTES", 100)
        monkeypatch.setattr(files, "BLOCK_BYTES", 7)
        path = tmp_path / "a.txt"
        path.write_text("häöü€😀" * 50)
        (document,) = whole(path, "text")
        assert isinstance(document, Document)
        pieces = list(document.parts[0])
        assert len(pieces) > 50
        assert "".join(pieces) == path.read_text()

    def test_source_files_have_a_header_and_binaries_are_set_aside(self, tmp_path: Path) -> None:
        (tmp_path / "a.py").write_text("x = 1\n")
        (tmp_path / "a.so").write_bytes(b"\x7fELF\0\1")
        (document,) = whole(tmp_path / "a.py", "code", options(header="# {path}\n"))
        assert isinstance(document, Document)
        assert (document.header, document.parts) == ("# a.py\n", (("x = 1\n",),))
        assert whole(tmp_path / "a.so", "code") == [Rejection("a.so", 0, "binary", "", is_fault=False)]

    def test_what_is_not_utf8_is_found_by_walking(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
        (document,) = whole(tmp_path / "a.txt", "text")
        assert isinstance(document, Document)
        with pytest.raises(UnicodeDecodeError):
            list(document.parts[0])


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("cut", [5, -5])
def test_a_compressed_file_that_ends_too_early_is_an_error(tmp_path: Path, compression: str, cut: int) -> None:
    path = tmp_path / f"part.jsonl{compression}"
    content = "".join(json.dumps({"text": f"{number * 7919}"}) + "\n" for number in range(50_000)).encode()
    path.write_bytes(COMPRESSORS[compression](content)[:cut])
    with pytest.raises(UserError, match=rf"part.jsonl{compression} is not a whole {compression[1:]} file"):
        reader_of("jsonl").survey(path, 1000)


@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"not a table at all", b"PAR1\0\0\0\0PAR1", b"ARROW1\0\0broken"])
def test_a_damaged_table_is_an_error(tmp_path: Path, format: FileFormat, content: bytes) -> None:
    path = tmp_path / f"a.{format}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a.{format} is not a whole {format} file .*fetch it again, or exclude it"):
        reader_of(format).survey(path, 1000)


def test_a_table_without_the_column_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column text; it has body"):
        whole(tmp_path / "a.parquet", "parquet")


def test_concatenated_members_are_one_text(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESSORS[suffix](b"one\n") + COMPRESSORS[suffix](b"two\n"))
        (document,) = whole(path, "text")
        assert isinstance(document, Document)
        assert "".join(document.parts[0]) == "one\ntwo\n"
