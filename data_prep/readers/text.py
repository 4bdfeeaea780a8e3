"""Files that are one document, and files of which each line is one. A line belongs to the stretch of its first byte."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.documents import Document, Rejection
from data_prep.readers.base import BLOCK_BYTES, ReadOptions, Stretch, Survey, document_of, excerpt_of_bytes, too_large
from data_prep.readers.files import FileText, named, opened
from data_prep.sources import compression_of

LARGE_FILE_BYTES = 8 << 20
BINARY_PROBE_BYTES = 8192


class Whole:
    """A file that is one document: prose, or with `probe` a file of a source tree, which may be binary."""

    def __init__(self, probe: bool) -> None:
        self._probe = probe

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        if self._probe:
            return Survey(path.stat().st_size, 1, 1)
        with named(path), opened(path) as file:
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
        with named(path), path.open("rb") as file:
            return b"\0" in file.read(BINARY_PROBE_BYTES)

    def _pieces(self, path: Path) -> Iterable[str]:
        text = FileText(path)
        if path.stat().st_size > LARGE_FILE_BYTES or compression_of(path):
            return text
        try:
            return ("".join(text),)
        except UnicodeDecodeError:
            return text  # whoever walks it finds out


class Lines:
    """A text file in which each line is a document."""

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        lines_before, lines, size = [], 0, 0
        with named(path), opened(path) as file:
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
                yield too_large(name, row, options)
            elif not line.isspace():
                yield self._document(name, row, line, options)

    def _document(self, name: str, row: int, line: bytes, options: ReadOptions) -> Document | Rejection:
        try:
            return Document(name, row, ((line.rstrip(b"\r\n").decode(),),))
        except UnicodeDecodeError:
            return Rejection(name, row, "not_utf8", excerpt_of_bytes(line))


class JsonLines(Lines):
    """A JSON object a line."""

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        for row, line in _lines(path, Stretch(0, sys.maxsize), BLOCK_BYTES):
            record = _parse(row, line or b"")
            if isinstance(record, dict):
                yield record

    def _document(self, name: str, row: int, line: bytes, options: ReadOptions) -> Document | Rejection:
        record = _parse(row, line)
        if isinstance(record, str):
            return Rejection(name, row, record, excerpt_of_bytes(line))
        return document_of(name, row, record, options, partial(excerpt_of_bytes, line))


def _lines(path: Path, stretch: Stretch, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Rows and lines whose first byte is in the stretch; None for a line of more than `max_bytes`."""
    with named(path), opened(path) as file:
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
    while num_bytes and (block := file.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(block)


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
