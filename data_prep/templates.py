"""From a record to the parts of a document: fields chosen by name, put together by templates.

A template is text with fields in braces, `"{title}\\n\\n{body}"`; what stands without braces is the name of one field.
A field inside another is named by its path, `meta.title` or `answers.0`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]


class FieldError(Exception):
    """A record does not have what a template needs; the message is the reason for its rejection."""


@dataclass(frozen=True)
class Template:
    """Literal texts and field paths in turn: literals[0] fields[0] literals[1] ... literals[n]."""

    literals: tuple[str, ...]
    fields: tuple[Path, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template or the name of a field. Raises ValueError when it is neither."""
        if not set(text) & set("{}"):
            return cls(("", ""), (tuple(text.split(".")),))
        literals, fields = [""], []
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r} is not a template ({error}); write {{field}}, and {{{{ for a brace") from None
        for literal, field, form, conversion in parsed:
            literals[-1] += literal
            if field is None:
                continue
            if not field or form or conversion:
                raise ValueError(f"{text!r}: {{{field}}} must name a field, without ':' or '!'")
            fields.append(tuple(field.split(".")))
            literals.append("")
        if not fields:
            raise ValueError(f"{text!r} names no field; write {{field}} where its text should stand")
        return cls(tuple(literals), tuple(fields))

    @property
    def columns(self) -> set[str]:
        """Fields of the record itself that are needed."""
        return {path[0] for path in self.fields}

    def fill(self, record: Any) -> str:
        """The text of a record. Raises FieldError."""
        if self.literals == ("", ""):
            value = look_up(record, self.fields[0])
            if not isinstance(value, str):
                raise FieldError("not_a_string")
            return value
        filled = [self.literals[0]]
        for path, literal in zip(self.fields, self.literals[1:], strict=True):
            value = look_up(record, path)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise FieldError("not_a_string")
            filled += [str(value), literal]
        return "".join(filled)


def look_up(record: Any, path: Path) -> Any:
    """Value at a path of keys and list indices. Raises FieldError."""
    for key in path:
        if isinstance(record, Mapping):
            record = record.get(key)
        elif isinstance(record, list | tuple) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        else:
            record = None
        if record is None:
            raise FieldError("missing_field")
    return record


@dataclass(frozen=True)
class RecordTemplate:
    """How records of one source become documents: one template for texts, two for pairs; or the turns of a dialogue."""

    parts: tuple[Template, ...] = ()
    turns: Path = ()
    turn: Template | None = None
    last_turn_is_target: bool = False

    @classmethod
    def of(
        cls, text: str, source: str, target: str, turns: str, turn: str, last_turn_is_target: bool
    ) -> RecordTemplate:
        """Of the keys of a SourceSpec. Raises ValueError when a template is malformed."""
        if turns:
            return cls((), tuple(turns.split(".")), Template.parse(turn), last_turn_is_target)
        return cls(tuple(Template.parse(part) for part in ((source, target) if source else (text,))))

    @property
    def kind(self) -> str:
        return "pair" if len(self.parts) == 2 or self.last_turn_is_target else "text"

    @property
    def columns(self) -> list[str]:
        """Fields of a record that are needed, sorted."""
        return sorted({self.turns[0]} if self.turns else set().union(*(part.columns for part in self.parts)))

    def parts_of(self, record: Any) -> tuple[str, ...]:
        """The texts of a document's parts. Raises FieldError."""
        if self.turn is None:
            return tuple(part.fill(record) for part in self.parts)
        turns = look_up(record, self.turns)
        if not isinstance(turns, list):
            raise FieldError("not_a_list")
        filled = [self.turn.fill([turn] if isinstance(turn, str) else turn) for turn in turns]
        if not self.last_turn_is_target:
            return ("".join(filled),)
        if len(filled) < 2:
            raise FieldError("fewer_than_two_turns")
        return "".join(filled[:-1]), filled[-1]
