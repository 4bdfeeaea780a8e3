"""What flows through the builder: documents, and records of what could not become one.

A part of a document is an iterable of pieces of text that can be walked more than once: a tuple of one string for a
record, a file read piece by piece for a document that may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Pieces = Iterable[str]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the source and the target of a pair.

    Attributes:
        origin: File it came from, relative to its source, with forward slashes.
        row: Index of its record in the file, from 0; 0 where the file is one document.
        parts: One for a text, two for a pair. Walking a part may raise UnicodeDecodeError.
        header: Text that stands before the first part but is no part of the document's identity.
    """

    origin: str
    row: int
    parts: tuple[Pieces, ...]
    header: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """What could not become a document of the dataset, and why.

    `is_fault` tells a record that cannot be read from a document that a filter has set aside.
    """

    origin: str
    row: int
    reason: str
    excerpt: str
    is_fault: bool = True


@dataclass(frozen=True, slots=True)
class Screened:
    """A cleaned document that may enter the dataset, with what a walk through it found."""

    document: Document
    document_id: bytes
    text_bytes: int
