"""How each kind of file is read: surveyed once as a whole, then in stretches, in constant memory.

A stretch is counted in the file's own units: bytes of its (decompressed) text where records are lines, rows of a table,
or 1 where the file is one document. A line belongs to the stretch that holds its first byte. Nothing is dropped
silently: whatever cannot become a document is yielded as a Rejection in its place.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
from isal import igzip
from isal.isal_zlib import IsalError

from data_prep.documents import Document, Rejection
from data_prep.sources import FileFormat, compression_of, plain_suffix
from data_prep.templates import FieldError, RecordTemplate
from mdseq.errors import UserError

BLOCK_BYTES = 1 << 20
LARGE_FILE_BYTES = 8 << 20
BINARY_PROBE_BYTES = 8192
EXCERPT_CHARACTERS = 500
TABLE_BATCH_BYTES = 8 << 20

_ARROW_CODECS = {".bz2": "bz2", ".zst": "zstd"}


@dataclass(frozen=True)
class Survey:
    """What one walk through a file finds.

    Attributes:
        text_bytes: Bytes of text to read, decompressed; for tables, about.
        units: Length in units.
        records: The most records that it can hold.
        lines_before: For files of lines, the number of line ends before each multiple of BLOCK_BYTES.
    """

    text_bytes: int
    units: int
    records: int
    lines_before: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """Units start..stop of a file; `row` is the number of line ends before `start`, for files of lines."""

    start: int
    stop: int
    row: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """What all files of a source share. `path_header` is a template with {path}."""

    template: RecordTemplate
    path_header: str
    max_record_bytes: int


class Reader(Protocol):
    """One kind of file."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey: ...

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        """Records as they are, from the first; text has none."""

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]: ...


def reader_of(format: FileFormat) -> Reader:
    return _READERS[format]


def first_record(format: FileFormat, path: Path) -> dict[str, Any] | None:
    """The first record of a file that is an object; None for text, and where there is none."""
    with _named(path):
        return next(iter(_READERS[format].records(path)), None)


class FileText:
    """Text of a file, piece by piece, as often as it is walked. Raises UnicodeDecodeError where it is not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with _named(self._path), _opened(self._path) as file:
            while block := file.read(BLOCK_BYTES):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)


class _Whole:
    """A file that is one document: prose, or with `probe` a file of a source tree, which may be binary."""

    def __init__(self, probe: bool) -> None:
        self._probe = probe

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        if self._probe:
            return Survey(path.stat().st_size, 1, 1)
        with _named(path), _opened(path) as file:
            return Survey(sum(map(len, iter(lambda: file.read(BLOCK_BYTES), b""))), 1, 1)

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        if self._probe and self._is_binary(path):
            yield Rejection(name, 0, "binary", "", is_fault=False)
            return
        header = options.path_header.replace("{path}", name) if self._probe else ""
        yield Document(name, 0, (self._pieces(path),), header)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        return ()

    def _is_binary(self, path: Path) -> bool:
        with _named(path), path.open("rb") as file:
            return b"\0" in file.read(BINARY_PROBE_BYTES)

    def _pieces(self, path: Path) -> Iterable[str]:
        text = FileText(path)
        if path.stat().st_size > LARGE_FILE_BYTES or compression_of(path):
            return text
        try:
            return ("".join(text),)
        except UnicodeDecodeError:
            return text  # whoever walks it finds out


class _Lines:
    """A text file in which each line is a document."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        lines_before, lines, size = [], 0, 0
        with _named(path), _opened(path) as file:
            while block := file.read(BLOCK_BYTES):
                lines_before.append(lines)
                lines += block.count(b"\n")
                size += len(block)
        return Survey(size, size, lines + 1, tuple(lines_before))

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        return ()

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        for row, line in _lines(path, stretch, options.max_record_bytes):
            if line is None:
                yield _too_large(name, row, options)
                continue
            if line.isspace():
                continue
            try:
                yield Document(name, row, ((line.rstrip(b"\r\n").decode(),),))
            except UnicodeDecodeError:
                yield Rejection(name, row, "not_utf8", _excerpt(line))


class _JsonLines(_Lines):
    """A JSON object a line."""

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        for row, line in _lines(path, Stretch(0, sys.maxsize), BLOCK_BYTES):
            record = _parse(row, line or b"")
            if isinstance(record, dict):
                yield record

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        for row, line in _lines(path, stretch, options.max_record_bytes):
            if line is None:
                yield _too_large(name, row, options)
                continue
            if line.isspace():
                continue
            record = _parse(row, line)
            if isinstance(record, str):
                yield Rejection(name, row, record, _excerpt(line))
            else:
                yield _document(name, row, record, options, partial(_excerpt, line))


class _Csv:
    """Comma-separated values with a header line, or tab-separated ones in a .tsv."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with _named(path), _opened(path) as file:
            counted = _Counted(file)
            units = sum(1 for _ in self._rows(path, cast(BinaryIO, counted), max_record_bytes))
        return Survey(counted.num_bytes, units, units)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        with _opened(path) as file:
            rows = self._rows(path, file, BLOCK_BYTES)
            header = next(rows, None)
            for row in rows:
                if isinstance(header, list) and isinstance(row, list):
                    yield dict(zip(header, row, strict=False))

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with _named(path), _opened(path) as file:
            rows = self._rows(path, file, options.max_record_bytes)
            header = next(rows, None)
            if not isinstance(header, list):
                raise UserError(f"{path} has no header line that names its columns: {header}")
            for index, row in enumerate(islice(rows, max(stretch.start - 1, 0), stretch.stop - 1)):
                number = max(stretch.start - 1, 0) + index
                if not row:
                    continue
                if isinstance(row, str):
                    yield Rejection(name, number, "not_csv", row)
                elif len(row) != len(header):
                    yield Rejection(name, number, "wrong_number_of_fields", _excerpt_of(row))
                elif any("\udc80" <= character <= "\udcff" for field in row for character in field):
                    yield Rejection(name, number, "not_utf8", _excerpt_of(row))
                else:
                    record = dict(zip(header, row, strict=True))
                    yield _document(name, number, record, options, partial(_excerpt_of, row))

    def _rows(self, path: Path, file: BinaryIO, max_record_bytes: int) -> Iterator[list[str] | str]:
        """The rows, header included; a message in the place of one that is malformed."""
        csv.field_size_limit(max_record_bytes)
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        lines = _short_lines(text, path, max_record_bytes)
        rows = csv.reader(lines, delimiter="\t" if plain_suffix(path) == ".tsv" else ",", strict=True)
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "field larger" in str(error):
                    raise _too_large_csv(path, max_record_bytes) from None
                yield str(error)


class _Parquet:
    """A Parquet file; only the columns needed are read."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with _table(path), pq.ParquetFile(path, pre_buffer=False) as file:
            groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
            text_bytes = sum(group.total_byte_size for group in groups)
            return Survey(text_bytes, file.metadata.num_rows, file.metadata.num_rows)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            for batch in file.iter_batches(batch_size=1):
                yield from batch.to_pylist()

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with _table(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            columns = _present(path, options.template, file.schema_arrow.names)
            first = 0
            for index in range(file.num_row_groups):
                group = file.metadata.row_group(index)
                if first < stretch.stop and first + group.num_rows > stretch.start:
                    row_bytes = max(group.total_byte_size // max(group.num_rows, 1), 1)
                    size = max(1, min(1024, TABLE_BATCH_BYTES // row_bytes))
                    batches = file.iter_batches(size, [index], columns, use_threads=False)
                    yield from _table_rows(batches, first, name, stretch, options)
                first += group.num_rows


class _Arrow:
    """An Arrow IPC file, or a stream as Hugging Face datasets writes it."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with _table(path):
            num_rows = sum(batch.num_rows for batch in self._batches(path))
            return Survey(path.stat().st_size, num_rows, num_rows)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        for batch in self._batches(path):
            for row in range(batch.num_rows):
                yield from batch.slice(row, 1).to_pylist()

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with _table(path):
            first = 0
            for batch in self._batches(path):
                if first < stretch.stop and first + batch.num_rows > stretch.start:
                    chosen = batch.select(_present(path, options.template, batch.schema.names))
                    row_bytes = max(chosen.nbytes // max(chosen.num_rows, 1), 1)
                    size = max(1, min(1024, TABLE_BATCH_BYTES // row_bytes))
                    slices = (chosen.slice(start, size) for start in range(0, chosen.num_rows, size))
                    yield from _table_rows(slices, first, name, stretch, options)
                first += batch.num_rows

    def _batches(self, path: Path) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = pa.ipc.open_stream(file)
            for batch in batches:
                batch.validate(full=True)  # a damaged offset would be followed out of the file
                yield batch


_READERS: dict[FileFormat, Reader] = {
    "text": _Whole(probe=False),
    "code": _Whole(probe=True),
    "lines": _Lines(),
    "jsonl": _JsonLines(),
    "csv": _Csv(),
    "parquet": _Parquet(),
    "arrow": _Arrow(),
}


class _Counted(io.RawIOBase):
    """Counts what is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes = 0
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self.num_bytes += len(block)
        return len(block)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    compression = compression_of(path)
    if compression in (".gz", ".xz"):
        with igzip.open(path, "rb") if compression == ".gz" else lzma.open(path, "rb") as unpacked:
            yield cast(BinaryIO, unpacked)
    elif compression:
        # Arrow's streams notice a file that ends too early; zstandard's own do not.
        stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), _ARROW_CODECS[compression])
        with io.BufferedReader(stream, BLOCK_BYTES) as buffered:
            yield cast(BinaryIO, buffered)
    else:
        with path.open("rb", buffering=BLOCK_BYTES) as file:
            yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, IsalError, lzma.LZMAError, EOFError) as error:  # type: ignore[misc]
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None or error.strerror is None:  # Arrow's decompressors
            raise _damaged(path, error) from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def _table(path: Path) -> Iterator[None]:
    """`_named` for a table, whose own names must be UTF-8, too."""
    with _named(path):
        try:
            yield
        except (UnicodeDecodeError, OverflowError, pa.ArrowException) as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    kind = (compression_of(path) or plain_suffix(path)).removeprefix(".")
    finding = " ".join(str(error).split())[:200]
    return UserError(f"{path} is not a whole {kind} file ({finding}); fetch it again, or exclude it")


def _lines(path: Path, stretch: Stretch, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Rows and lines whose first byte is in the stretch; None for a line of more than `max_bytes`."""
    with _named(path), _opened(path) as file:
        position, row = 0, stretch.row
        if stretch.start:
            # From the byte before, so that a line that begins exactly at the start is not taken for a rest.
            _skip(file, stretch.start - 1)
            position = stretch.start - 1
            rest = _line(file, 0)
            position += rest[1]
            row += rest[1] > 1
        while position < stretch.stop:
            line, length = _line(file, max_bytes)
            if not length:
                return
            yield row, line
            position += length
            row += 1


def _line(file: BinaryIO, max_bytes: int) -> tuple[bytes | None, int]:
    """A line, or None if it is longer than allowed, and its length."""
    line = file.readline(max_bytes + 1)
    length = len(line)
    if length <= max_bytes:
        return line, length
    while not line.endswith(b"\n") and (line := file.readline(BLOCK_BYTES)):
        length += len(line)
    return None, length


def _skip(file: BinaryIO, num_bytes: int) -> None:
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(num_bytes)
        return
    while num_bytes:
        num_bytes -= len(file.read(min(num_bytes, BLOCK_BYTES)))


def _short_lines(text: io.TextIOWrapper, path: Path, max_bytes: int) -> Iterator[str]:
    while line := text.readline(max_bytes + 1):
        if len(line) > max_bytes:
            raise _too_large_csv(path, max_bytes)
        yield line


def _parse(row: int, line: bytes) -> dict[str, Any] | str:
    """The object that a line holds, or the reason why there is none."""
    if row == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not_utf8"
    except (ValueError, RecursionError):
        return "not_json"
    return record if isinstance(record, dict) else "not_an_object"


def _table_rows(
    batches: Iterable[pa.RecordBatch], first: int, name: str, stretch: Stretch, options: ReadOptions
) -> Iterator[Document | Rejection]:
    """Documents of consecutive batches, of which `first` is the number of the first row."""
    for batch in batches:
        start, stop = max(stretch.start - first, 0), min(stretch.stop - first, batch.num_rows)
        if start < stop:
            records = _records(batch.slice(start, stop - start))
            for row, record in enumerate(records, start=first + start):
                if record is None:
                    yield Rejection(name, row, "not_utf8", "")
                else:
                    yield _document(name, row, record, options, partial(_excerpt_of, record))
        first += batch.num_rows


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one whose strings are not UTF-8, which Arrow does not check when it reads."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [record for row in range(batch.num_rows) for record in _records(batch.slice(row, 1))]


def _document(
    name: str, row: int, record: Any, options: ReadOptions, excerpt: Callable[[], str]
) -> Document | Rejection:
    try:
        parts = options.template.parts_of(record)
    except FieldError as reason:
        return Rejection(name, row, str(reason), excerpt())
    if sum(map(len, parts)) > options.max_record_bytes:
        return _too_large(name, row, options)
    return Document(name, row, tuple((part,) for part in parts))


def _present(path: Path, template: RecordTemplate, names: list[str]) -> list[str]:
    missing = [column for column in template.columns if column not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; it has {', '.join(names)}")
    return template.columns


def _too_large(name: str, row: int, options: ReadOptions) -> Rejection:
    return Rejection(name, row, "too_large", f"longer than shards.max_record_mb = {options.max_record_bytes / 1e6:g}")


def _too_large_csv(path: Path, max_bytes: int) -> UserError:
    return UserError(
        f"{path} has a field of more than {max_bytes / 1e6:g} MB, or a quote that is never closed; mend it, or raise "
        "shards.max_record_mb"
    )


def _excerpt(content: bytes) -> str:
    return content[: 4 * EXCERPT_CHARACTERS].decode(errors="replace").rstrip("\r\n")[:EXCERPT_CHARACTERS]


def _excerpt_of(record: Any) -> str:
    return repr(record)[:EXCERPT_CHARACTERS].encode(errors="replace").decode()
