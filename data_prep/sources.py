"""From paths to documents: which files to read, and how each kind of file is cut into documents.

A text file or a source file is one document, exact to the byte. A JSONL file holds a document a line. Nothing
is dropped silently: whatever cannot become a document is yielded as a Rejection in its place.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Literal

from mdseq.errors import UserError

FileFormat = Literal["text", "jsonl", "code"]
TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
JSONL_SUFFIXES = (".jsonl",)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "node_modules"})
BINARY_PROBE_BYTES = 8192
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class SourceFile:
    """A file to read; `name` is its path relative to the folder given, with forward slashes."""

    path: Path
    name: str
    format: FileFormat


@dataclass(frozen=True)
class Document:
    """A text, or a source `text` with its `target`; `line` is 0 where the file is one document."""

    source: str
    line: int
    text: str
    target: str | None = None


@dataclass(frozen=True)
class Rejection:
    """What could not become a document, and why."""

    source: str
    line: int
    reason: str
    excerpt: str


def find_sources(root: Path, format: str, exclude: tuple[str, ...]) -> list[SourceFile]:
    """Files under `root` (or `root` itself) to read, sorted by name.

    `auto` means JSONL where there is any (text beside records describes them), else text. Hidden names and
    the folders that tools fill are skipped, and so is a path when it or one of its parts matches a pattern of
    `exclude`.

    Raises UserError when there is nothing to read.
    """
    if not root.exists():
        raise UserError(f"DATA {root} does not exist; give a file or a folder of text")
    paths = [root] if root.is_file() else [path for path in _walk(root) if not _excluded(path, root, exclude)]
    found = _choose(paths, format, by_suffix=format == "auto" or root.is_dir())
    if not found:
        raise UserError(
            f"nothing to read in {root} as FORMAT={format}: {len(paths):,} files looked at; text is "
            f"{', '.join(TEXT_SUFFIXES)}, records are {', '.join(JSONL_SUFFIXES)}, each plain or .gz; "
            "for a source tree say FORMAT=code"
        )
    base = root.parent if root.is_file() else root
    named = [SourceFile(path, path.relative_to(base).as_posix(), kind) for path, kind in found]
    return sorted(named, key=lambda source: source.name)


def read_source(source: SourceFile, text_key: str) -> Iterator[Document | Rejection]:
    """Documents of one file in order. Raises UserError when a compressed file is damaged."""
    opener = gzip.open if source.path.suffix == ".gz" else open
    try:
        with opener(source.path, "rb") as file:
            if source.format == "jsonl":
                yield from _records(source.name, file, text_key)
            else:
                yield _whole_file(source, file.read())
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{source.path} is not a whole gzip file ({error}); fetch it again, or --exclude it") from None


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _excluded(path: Path, root: Path, exclude: tuple[str, ...]) -> bool:
    relative = path.relative_to(root)
    return any(fnmatch(name, pattern) for pattern in exclude for name in (relative.as_posix(), *relative.parts))


def _choose(paths: list[Path], format: str, by_suffix: bool) -> list[tuple[Path, FileFormat]]:
    if format == "code":
        return [(path, "code") for path in paths]
    text = [path for path in paths if not by_suffix or _has_suffix(path, TEXT_SUFFIXES)]
    jsonl = [path for path in paths if not by_suffix or _has_suffix(path, JSONL_SUFFIXES)]
    if format == "jsonl" or (format == "auto" and jsonl):
        return [(path, "jsonl") for path in jsonl]
    return [(path, "text") for path in text]


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(suffixes)


def _whole_file(source: SourceFile, content: bytes) -> Document | Rejection:
    if source.format == "code" and b"\0" in content[:BINARY_PROBE_BYTES]:
        return Rejection(source.name, 0, "binary", "")
    try:
        return Document(source.name, 0, content.decode())
    except UnicodeDecodeError:
        return Rejection(source.name, 0, "not_utf8", _excerpt(content))


def _records(name: str, file: BinaryIO | gzip.GzipFile, text_key: str) -> Iterator[Document | Rejection]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        parsed = _parse(line, text_key)
        if isinstance(parsed, str):
            yield Rejection(name, number, parsed, _excerpt(line))
        else:
            yield Document(name, number, *parsed)


def _parse(line: bytes, text_key: str) -> list[str] | str:
    """The text of a record, or its source and target, or the reason why it has none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not_utf8"
    except (ValueError, RecursionError):
        return "not_json"
    if not isinstance(record, dict):
        return "not_an_object"
    keys = (text_key,) if text_key in record else ("src", "trg")
    if any(key not in record for key in keys):
        return "missing_field"
    fields = [record[key] for key in keys]
    return fields if all(isinstance(field, str) for field in fields) else "not_a_string"


def _excerpt(content: bytes) -> str:
    return content[:EXCERPT_CHARACTERS].decode(errors="replace").rstrip("\n")
