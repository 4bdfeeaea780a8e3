"""What a reader does: it surveys a file once, as a whole, and then reads stretches of it in constant memory.

A stretch is counted in the file's own units: bytes of its (decompressed) text where records are lines, rows of a table,
or 1 where the file is one document. Nothing is dropped silently: whatever cannot become a document is yielded as a
Rejection in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.documents import Document, Rejection
from data_prep.templates import FieldError, RecordTemplate

BLOCK_BYTES = 1 << 20
EXCERPT_CHARACTERS = 500


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

    def survey(self, path: Path, max_record_bytes: int) -> Survey:
        """Walk through a file. Raises UserError when it is damaged."""

    def records(self, path: Path) -> Iterable[dict[str, Any]]:
        """Records as they are, from the first; text has none."""

    def read(self, path: Path, name: str, stretch: Stretch, options: ReadOptions) -> Iterator[Document | Rejection]:
        """Documents of a stretch, in order; `name` is their origin. Raises UserError when the file is damaged."""


def document_of(
    name: str, row: int, record: Any, options: ReadOptions, excerpt: Callable[[], str]
) -> Document | Rejection:
    """The document that a record holds; `excerpt` shows the record in a rejection."""
    try:
        parts = options.template.parts_of(record)
    except FieldError as reason:
        return Rejection(name, row, str(reason), excerpt())
    if sum(map(len, parts)) > options.max_record_bytes:
        return too_large(name, row, options)
    return Document(name, row, tuple((part,) for part in parts))


def too_large(name: str, row: int, options: ReadOptions) -> Rejection:
    return Rejection(name, row, "too_large", f"longer than shards.max_record_mb = {options.max_record_bytes / 1e6:g}")


def excerpt_of_bytes(content: bytes) -> str:
    return content[: 4 * EXCERPT_CHARACTERS].decode(errors="replace").rstrip("\r\n")[:EXCERPT_CHARACTERS]


def excerpt_of(record: Any) -> str:
    return repr(record)[:EXCERPT_CHARACTERS].encode(errors="replace").decode()
