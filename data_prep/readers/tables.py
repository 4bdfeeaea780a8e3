"""Tables: CSV, Parquet and Arrow. Units are rows, and of Parquet and Arrow only the columns needed are read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.documents import Document, Rejection
from data_prep.readers.base import BLOCK_BYTES, ReadOptions, Stretch, Survey, document_of, excerpt_of
from data_prep.readers.files import damaged, named, opened
from data_prep.sources import plain_suffix
from data_prep.templates import RecordTemplate
from mdseq.errors import UserError

TABLE_BATCH_BYTES = 8 << 20
TABLE_BATCH_ROWS = 1024
MOST_FIELD_BYTES = 1 << 30


class Csv:
    """Comma-separated values with a header line, or tab-separated ones in a .tsv."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with named(path), opened(path) as file:
            counted = _Counted(file)
            units = sum(1 for _ in self._rows(path, cast(BinaryIO, counted), max_record_bytes))
        return Survey(counted.num_bytes, units, units)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        with opened(path) as file:
            rows = self._rows(path, file, MOST_FIELD_BYTES)
            header = next(rows, None)
            for row in rows:
                if isinstance(header, list) and isinstance(row, list):
                    yield dict(zip(header, row, strict=False))

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with named(path), opened(path) as file:
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
                    yield Rejection(name, number, "wrong_number_of_fields", excerpt_of(row))
                elif any("\udc80" <= character <= "\udcff" for field in row for character in field):
                    yield Rejection(name, number, "not_utf8", excerpt_of(row))
                else:
                    record = dict(zip(header, row, strict=True))
                    yield document_of(name, number, record, options, partial(excerpt_of, row))

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


class Parquet:
    """A Parquet file; only the columns needed are read."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with _table(path), pq.ParquetFile(path, pre_buffer=False) as file:
            groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
            text_bytes = sum(group.total_byte_size for group in groups)
            return Survey(text_bytes, file.metadata.num_rows, file.metadata.num_rows)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            for batch in file.iter_batches(batch_size=1):
                yield from _whole_records(batch)

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with _table(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            columns = _present(path, options.template, file.schema_arrow.names)
            first = 0
            for index in range(file.num_row_groups):
                group = file.metadata.row_group(index)
                if first < stretch.stop and first + group.num_rows > stretch.start:
                    row_bytes = max(group.total_byte_size // max(group.num_rows, 1), 1)
                    size = max(1, min(TABLE_BATCH_ROWS, TABLE_BATCH_BYTES // row_bytes))
                    batches = file.iter_batches(size, [index], columns, use_threads=False)
                    yield from _table_rows(batches, first, name, stretch, options)
                first += group.num_rows


class Arrow:
    """An Arrow IPC file, or a stream as Hugging Face datasets writes it."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        with _table(path):
            num_rows = sum(batch.num_rows for batch in self._batches(path))
            return Survey(path.stat().st_size, num_rows, num_rows)

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        for batch in self._batches(path):
            for row in range(batch.num_rows):
                yield from _whole_records(batch.slice(row, 1))

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        with _table(path):
            first = 0
            for batch in self._batches(path):
                if first < stretch.stop and first + batch.num_rows > stretch.start:
                    chosen = batch.select(_present(path, options.template, batch.schema.names))
                    row_bytes = max(chosen.nbytes // max(chosen.num_rows, 1), 1)
                    size = max(1, min(TABLE_BATCH_ROWS, TABLE_BATCH_BYTES // row_bytes))
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
def _table(path: Path) -> Iterator[None]:
    """`named` for a table, whose own names must be UTF-8, too."""
    with named(path):
        try:
            yield
        except (UnicodeDecodeError, OverflowError, pa.ArrowException) as error:
            raise damaged(path, error) from None


def _table_rows(
    batches: Iterable[pa.RecordBatch], first: int, name: str, stretch: Stretch, options: ReadOptions
) -> Iterator[Document | Rejection]:
    """Documents of consecutive batches, of which `first` is the number of the first row."""
    for batch in batches:
        if first >= stretch.stop:
            return
        start, stop = max(stretch.start - first, 0), min(stretch.stop - first, batch.num_rows)
        if start < stop:
            records = _records(batch.slice(start, stop - start))
            for row, record in enumerate(records, start=first + start):
                if record is None:
                    yield Rejection(name, row, "not_utf8", "")
                else:
                    yield document_of(name, row, record, options, partial(excerpt_of, record))
        first += batch.num_rows


def _whole_records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    return (record for record in _records(batch) if record is not None)


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one whose strings are not UTF-8, which Arrow does not check when it reads."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [record for row in range(batch.num_rows) for record in _records(batch.slice(row, 1))]


def _present(path: Path, template: RecordTemplate, names: list[str]) -> list[str]:
    missing = [column for column in template.columns if column not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; it has {', '.join(names)}")
    return template.columns


def _short_lines(text: io.TextIOWrapper, path: Path, max_bytes: int) -> Iterator[str]:
    while line := text.readline(max_bytes + 1):
        if len(line) > max_bytes:
            raise _too_large_csv(path, max_bytes)
        yield line


def _too_large_csv(path: Path, max_bytes: int) -> UserError:
    return UserError(
        f"{path} has a field of more than {max_bytes / 1e6:g} MB, or a quote that is never closed; mend it, or raise "
        "shards.max_record_mb"
    )
