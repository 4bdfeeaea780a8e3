"""Pairs of code and docstring from Python source trees: a sequence-to-sequence set that every machine has."""

from __future__ import annotations

import ast
import gzip
import inspect
import io
import json
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from data_prep.sources import SourceFile, find_files
from data_prep.spec import SourceSpec
from mdseq.errors import UserError
from mdseq.files import put_in_place, temporary_name

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class PairCounts:
    """What was read and written. `unreadable`: the files that are no Python source to this interpreter, and why."""

    files: int
    pairs: int
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A line of the file.

    Attributes:
        src: Source code of a definition, without its docstring and its indentation.
        trg: The docstring, as `inspect.cleandoc` cleans it.
        path: Its file, relative to the tree.
        name: The definition's name after those around it: `Class.method`.
    """

    src: str
    trg: str
    path: str
    name: str


def write_pairs(roots: Iterable[Path], out_path: Path) -> PairCounts:
    """Write a pair for each function, method and class that has a docstring, as JSON Lines.

    Args:
        roots: Source trees, read in this order, their files by name; what `find_files` skips in a tree is skipped.
        out_path: File to create, .jsonl or .jsonl.gz. It appears when it is complete; equal trees give equal bytes.

    Raises:
        UserError: `out_path` exists, cannot be written or has another suffix; or there is nothing to write.
    """
    if not out_path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{out_path}: pairs are JSON Lines; give it a name that ends in .jsonl or .jsonl.gz")
    if out_path.exists():
        raise UserError(f"{out_path} exists and is never overwritten; remove it, or choose another name")
    trees = SourceSpec(name="trees", path=tuple(map(str, roots)), format="code")
    files = [file for file in find_files(trees) if file.path.suffix == ".py"]
    temporary = temporary_name(out_path)
    try:
        with _created(temporary, is_compressed=out_path.suffix == ".gz") as output:
            counts = _write(files, output)
        if not counts.pairs:
            raise UserError(f"no docstring in {counts.files:,} Python files below {', '.join(trees.path)}; give others")
        put_in_place(temporary, out_path)
    except OSError as error:
        raise UserError(f"cannot write {out_path}: {error.strerror or error}; make room, or choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def pairs_of(source: str, path: str) -> Iterator[Pair]:
    """The pairs of a file, from top to bottom. Raises SyntaxError, ValueError, RecursionError or MemoryError.

    Args:
        source: Its text, with lines that end in "\\n".
        path: Its name, for the pairs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd escapes in code that is not ours
        tree = ast.parse(source)
    lines = source.split("\n")
    for name, definition in _definitions(tree):
        text = ast.get_docstring(definition, clean=False)
        docstring = inspect.cleandoc(text) if text else ""
        if docstring and _is_unicode(docstring):
            yield Pair(_without_docstring(lines, definition), docstring, path, name)


def _write(files: list[SourceFile], output: TextIO) -> PairCounts:
    num_pairs = 0
    unreadable: dict[str, str] = {}
    for file in files:
        try:
            with tokenize.open(file.path) as opened:  # decodes as Python does
                pairs = list(pairs_of(opened.read(), file.name))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
            unreadable[file.name] = f"{type(error).__name__}: {error}"
            continue
        for pair in pairs:
            output.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
        num_pairs += len(pairs)
    return PairCounts(files=len(files), pairs=num_pairs, unreadable=unreadable)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Every definition and its name, outer ones first. Without recursion, for `elif` nests as deep as it is long."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, Definition):
            yield prefix + node.name, node
            prefix += f"{node.name}."
        inner = (ast.stmt, ast.ExceptHandler, ast.match_case)
        waiting += [(prefix, child) for child in reversed([*ast.iter_child_nodes(node)]) if isinstance(child, inner)]


def _without_docstring(lines: list[str], definition: Definition) -> str:
    """The exact text of a definition, decorators included, but for its docstring and its indentation."""
    docstring = definition.body[0]
    assert docstring.end_lineno is not None
    first = min(node.lineno for node in (definition, *definition.decorator_list))
    # Columns are counted in bytes.
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode()
    seam = before + after.lstrip(" \t;") if after.lstrip().startswith(";") else before + after
    kept = [
        *lines[first - 1 : docstring.lineno - 1],
        *([seam] if seam.strip() else []),
        *lines[docstring.end_lineno : definition.end_lineno],
    ]
    margin = kept[0][: len(kept[0]) - len(kept[0].lstrip())]
    return "\n".join(line.removeprefix(margin) for line in kept).rstrip()


def _is_unicode(text: str) -> bool:
    """An escape can put half a character into a docstring, which no text file holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _created(path: Path, is_compressed: bool) -> Iterator[TextIO]:
    with path.open("wb") as file:
        # Neither name nor time in the header: equal content, equal bytes.
        compressed = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if is_compressed else None
        with io.TextIOWrapper(compressed or file, encoding="utf-8", newline="\n") as text:
            yield text
