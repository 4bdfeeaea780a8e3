"""What `mdseq generate` is asked to write: one text from the command line, or one for each line of a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdseq.errors import UserError


@dataclass(frozen=True)
class Requests:
    """The inputs, in their order.

    Attributes:
        records: The objects that they came as; their texts are found under the keys that the command names.
        fingerprint: What tells these inputs from others.
    """

    records: list[dict[str, Any]]
    fingerprint: str

    @classmethod
    def one(cls, record: dict[str, Any]) -> Requests:
        """From the command line."""
        for text in record.values():
            _require_unicode(text, "the command line")
        return cls([record], "the command line")

    @classmethod
    def read(cls, path: Path, key: str, option: str) -> Requests:
        """The objects of a JSONL file.

        Args:
            path: The file.
            key: Every object must have a text there.
            option: What the user names the key with.

        Raises:
            UserError: The file cannot be read, or a line is no object with such a text.
        """
        try:
            content = path.read_bytes()
            lines = content.decode("utf-8-sig").split("\n")  # only there: JSON allows other ends of lines in a text
        except OSError as error:
            raise UserError(f"cannot read --input {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read --input {path}: it is not UTF-8 at byte {error.start:,}") from None
        records = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from None
            records.append(record)
            _require_text(record, key, option, f"{path}, line {number}")
        if not records:
            raise UserError(f"--input {path} is empty; give one JSON object a line")
        return cls(records, f"{len(records)} lines of SHA-256 {hashlib.sha256(content).hexdigest()[:16]}")

    def require(self, key: str, option: str) -> None:
        """Raises UserError: a record has no text under another key."""
        for number, record in enumerate(self.records, start=1):
            _require_text(record, key, option, f"record {number}")


def _require_text(record: Any, key: str, option: str, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f'{where} is no JSON object; give one a line, such as {{{json.dumps(key)}: "..."}}')
    if not isinstance(record.get(key), str):
        keys = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where} has no text under {key!r}, of the keys {keys}; name another with {option}")
    _require_unicode(record[key], where)


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate); give valid Unicode") from None
