"""Which documents are worth keeping. Text is kept or rejected whole, never changed."""

from __future__ import annotations

from data_prep.sources import EXCERPT_CHARACTERS, Document, Rejection


def screen(record: Document | Rejection) -> Document | Rejection:
    """The document itself, or its rejection."""
    if isinstance(record, Rejection):
        return record
    reason = _reason_to_reject(record)
    if reason is None:
        return record
    excerpt = record.text[:EXCERPT_CHARACTERS].encode(errors="replace").decode()
    return Rejection(record.source, record.line, reason, excerpt)


def _reason_to_reject(document: Document) -> str | None:
    parts = [document.text] if document.target is None else [document.text, document.target]
    if not all(part.strip() for part in parts):
        return "empty"
    try:
        for part in parts:
            part.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return "invalid_unicode"
    return None
