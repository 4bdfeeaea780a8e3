"""Which reader reads which format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.readers.base import Reader
from data_prep.readers.files import named
from data_prep.readers.tables import Arrow, Csv, Parquet
from data_prep.readers.text import JsonLines, Lines, Whole
from data_prep.sources import FileFormat

_READERS: dict[FileFormat, Reader] = {
    "text": Whole(probe=False),
    "code": Whole(probe=True),
    "lines": Lines(),
    "jsonl": JsonLines(),
    "csv": Csv(),
    "parquet": Parquet(),
    "arrow": Arrow(),
}


def reader_of(format: FileFormat) -> Reader:
    return _READERS[format]


def first_record(format: FileFormat, path: Path) -> dict[str, Any] | None:
    """The first record of a file that is an object; None for text, and where there is none."""
    with named(path):
        return next(iter(_READERS[format].records(path)), None)
