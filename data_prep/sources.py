"""Which files a source is made of, in a fixed order, and what each is read as."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import pathspec

from data_prep.spec import SourceSpec
from mdseq.data.format import Split
from mdseq.errors import UserError

FileFormat = Literal["text", "lines", "jsonl", "csv", "parquet", "arrow", "code"]

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".text")
RECORD_SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
}
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "node_modules"})


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        name: Its path relative to the folder given, with forward slashes.
        split: Where all its documents go, or None where their ids decide.
    """

    path: Path
    name: str
    format: FileFormat
    split: Split | None


def find_files(source: SourceSpec) -> list[SourceFile]:
    """The files of a source, sorted by name, those of an earlier path first.

    `auto` means files of records where there are any (text beside records describes them), else text. Hidden names and
    the folders that tools fill are skipped, and so is a path when it or one of its parts matches a pattern of
    `exclude`; in a source tree, what its .gitignore files name.

    Raises:
        UserError: Nothing to read, or a file whose split is to be told by its name, and is not.
    """
    found: list[SourceFile] = []
    for root in source.path:
        found += sorted(_files_under(root, source), key=lambda file: file.name)
    unique = list({file.path: file for file in found}.values())
    if not unique:
        raise UserError(_nothing_to_read(source))
    return unique


def _files_under(root: str, source: SourceSpec) -> Iterator[SourceFile]:
    path = Path(root)
    if path.is_file():
        names = [(path, path.name)]
    elif path.is_dir():
        names = [(file, file.relative_to(path).as_posix()) for file in _walk(path, ignored=source.format == "code")]
    else:
        names = list(_matches(root))
        if not names:
            raise UserError(f"{root} does not exist; give a file, a folder or a glob of text (sources.{source.name})")
    kept = [(file, name) for file, name in names if not _excluded(name, source.exclude)]
    for file, name, kind in _choose(kept, source.format, only=path.is_file()):
        yield SourceFile(file, name, kind, _split_of(file, source))


def _matches(pattern: str) -> Iterator[tuple[Path, str]]:
    """Files that a glob matches, named from the folder before its first wildcard."""
    base = Path(*_before_wildcard(Path(pattern).parts)) if Path(pattern).parts else Path()
    for match in sorted(glob.glob(pattern, recursive=True)):
        if Path(match).is_file():
            yield Path(match), Path(os.path.relpath(match, base)).as_posix()


def _before_wildcard(parts: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        kept.append(part)
    return kept


def _walk(root: Path, ignored: bool) -> Iterator[Path]:
    """Files below a folder; with `ignored`, without what .gitignore files name, as git reads them."""
    ignores: dict[str, pathspec.GitIgnoreSpec] = {}
    for folder, subfolders, names in os.walk(root):
        if ignored and ".gitignore" in names:
            lines = Path(folder, ".gitignore").read_text(encoding="utf-8", errors="replace").splitlines()
            ignores[folder] = pathspec.GitIgnoreSpec.from_lines(lines)
        subfolders[:] = [
            name
            for name in sorted(subfolders)
            if not name.startswith(".")
            and name not in SKIPPED_FOLDERS
            and not _is_ignored(Path(folder, name), root, ignores, is_folder=True)
        ]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not _is_ignored(path, root, ignores, is_folder=False):
                yield path


def _is_ignored(path: Path, root: Path, ignores: dict[str, pathspec.GitIgnoreSpec], is_folder: bool) -> bool:
    """Whether the nearest .gitignore that has a pattern for the path ignores it."""
    if not ignores:
        return False
    folder = path.parent
    while True:
        spec = ignores.get(str(folder))
        if spec is not None:
            verdict = spec.check_file(path.relative_to(folder).as_posix() + ("/" if is_folder else "")).include
            if verdict is not None:
                return verdict
        if folder == root:
            return False
        folder = folder.parent


def _excluded(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(part, pattern) for pattern in patterns for part in (name, *name.split("/")))


def _choose(files: list[tuple[Path, str]], format: str, only: bool) -> Iterator[tuple[Path, str, FileFormat]]:
    """Each file with what it is read as; `only` a single file may have any name if its format is given."""
    suffixes = [(path, name, plain_suffix(path)) for path, name in files]
    if format == "code":
        yield from ((path, name, "code") for path, name in files)
        return
    records = [(path, name, RECORD_SUFFIXES[suffix]) for path, name, suffix in suffixes if suffix in RECORD_SUFFIXES]
    texts = [(path, name) for path, name, suffix in suffixes if suffix in TEXT_SUFFIXES]
    if format == "auto":
        yield from records or ((path, name, "text") for path, name in texts)
    elif format in ("text", "lines"):
        kind: FileFormat = "text" if format == "text" else "lines"
        yield from ((path, name, kind) for path, name in (files if only else texts))
    elif only:
        yield from ((path, name, format) for path, name in files)  # type: ignore[misc]
    else:
        yield from (record for record in records if record[2] == format)


def plain_suffix(path: Path) -> str:
    """Suffix of a file's name, in lower case, before that of its compression."""
    name = path.name.lower()
    return Path(name.removesuffix(compression_of(path))).suffix


def compression_of(path: Path) -> str:
    """`.gz`, `.zst`, `.bz2` or `.xz`, or nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def _split_of(path: Path, source: SourceSpec) -> Split | None:
    if source.split == "hash":
        return None
    if source.split != "name":
        return source.split
    for name, split in SPLIT_NAMES.items():
        rest = path.name.lower().removeprefix(name)
        if rest != path.name.lower() and not rest[:1].isalpha():
            return split
    raise UserError(
        f"{path}: its name does not begin with {', '.join(SPLIT_NAMES)}, and sources.{source.name}.split = name asks "
        "for that; rename it, leave it out with exclude, or set split to hash"
    )


def _nothing_to_read(source: SourceSpec) -> str:
    return (
        f"nothing to read in {', '.join(source.path)} as format = {source.format}; text is {', '.join(TEXT_SUFFIXES)}, "
        f"records are {', '.join(RECORD_SUFFIXES)}, each plain or {', '.join(COMPRESSIONS)} (parquet and arrow plain); "
        "for a source tree give format = code, for a single file of another name its format"
    )
