"""Settings that are read from TOML, changed by `section.key=value` overrides, and checked as a whole.

Every problem is reported at once, with its path, the value found, what is allowed and where the value came from.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from mdseq.errors import UserError


class Section(BaseModel):
    """A frozen group of settings; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_toml(self) -> str:
        """All settings, defaults included, as TOML that `resolve` reads back; what is None is left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True)
class Resolved(Generic[Settings]):
    """Settings and where each of their values came from.

    `origins` maps a dotted path to "file" or "command line"; what it lacks is a default.
    """

    spec: Settings
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(path, value, origin) of every value, in the order of the settings."""
        leaves = flatten(self.spec.model_dump(mode="json"))
        return [(path, str(value), self.origins.get(path, "default")) for path, value in leaves.items()]


def resolve(
    kind: type[Settings], title: str, path: Path | None, values: dict[str, Any], overrides: Iterable[str] = ()
) -> Resolved[Settings]:
    """Apply overrides to what a file holds, and validate the result.

    Args:
        kind: The settings to make.
        title: What they are called in messages, such as "run spec".
        path: The file that `values` came from, if any.
        values: Nested settings as `read_toml` returns them; changed in place.
        overrides: `section.key=value` in TOML syntax; what is not TOML is taken as a string. An item of a list has its
            number as its key.

    Raises:
        UserError: Naming every problem of the file and the overrides at once.
    """
    origins = dict.fromkeys(flatten(values), "file")
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value, override)
        origins[key] = "command line"
    try:
        return Resolved(kind.model_validate(values), origins)
    except ValidationError as error:
        raise UserError(_Complaint(kind, title, path, origins).describe(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises UserError when it is not one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections, and lists of sections, to dotted paths."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    leaves: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, Mapping) or _is_list_of_sections(value):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not of the form section.key=value, for example schedule.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, leaf = key.split(".")
    inner: Any = values
    for section in sections:
        if isinstance(inner, list):
            inner = inner[_item(inner, section, override)]
        elif isinstance(inner, dict):
            inner = inner.setdefault(section, {})
        if not isinstance(inner, dict | list):
            raise UserError(f"{override!r}: {section} is a single value, not a section")
    inner[_item(inner, leaf, override) if isinstance(inner, list) else leaf] = value


def _item(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"{override!r}: {key} is not an item of the list; allowed: 0 to {len(items) - 1}")
    return int(key)


class _Complaint:
    """Pydantic's findings in the user's terms."""

    def __init__(self, kind: type[Section], title: str, path: Path | None, origins: Mapping[str, str]) -> None:
        self.kind = kind
        self.title = title
        self.path = path
        self.origins = origins

    def describe(self, error: ValidationError) -> str:
        """One paragraph a problem: path, value, origin, what is allowed and the fix."""
        problems = []
        locations = [item["loc"] for item in error.errors()]
        for item in error.errors():
            location = ".".join(str(part) for part in item["loc"])
            if item["type"] == "too_short" and any(
                item["loc"] == longer[: len(item["loc"])] != longer for longer in locations
            ):
                continue  # pydantic does not count items that have a problem of their own
            if item["type"] == "value_error":  # a check over several keys: its message names them itself
                problems.append(f"  {item['ctx']['error']}")
                continue
            origin = self.origins.get(location) or self._nearby_origin(location)
            if item["type"] == "missing":
                problems.append(f"  {location} (from {origin}) is missing{self._purpose(location)}")
            elif item["type"] == "extra_forbidden":
                known = [*self.kind.model_fields, *_known_paths(self.kind)]
                close = difflib.get_close_matches(_without_numbers(location), known, n=1)
                page = f"docs/{self.title.replace(' ', '_')}.md"
                advice = f"did you mean {close[0]}?" if close else f"remove it; {page} lists every key"
                problems.append(f"  {location} (from {origin}) is not a key of the {self.title}; {advice}")
            else:
                allowed = item["msg"].removeprefix("Input ")
                problems.append(f"  {location} = {item['input']!r} (from {origin}) {allowed}{self._purpose(location)}")
        source = f"{self.path}" if self.path is not None else f"the {self.title}"
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return f"{count} in {source}:\n" + "\n".join(problems)

    def _nearby_origin(self, location: str) -> str:
        """Origin of a section of which only single keys have one, or of a key of which only the section has."""
        for path, origin in self.origins.items():
            if f"{location}.".startswith(f"{path}.") or path.startswith(f"{location}."):
                return origin
        return "file"

    def _purpose(self, location: str) -> str:
        section: type[Section] | None = self.kind
        for key in _without_numbers(location).split("."):
            field = section.model_fields.get(key) if section is not None else None
            if field is None:
                return ""
            description, section = field.description, section_in(field.annotation)
        return f" ({description})" if description and section is None else ""


def section_in(annotation: Any) -> type[Section] | None:
    """The Section that a field holds, or holds a tuple of."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _known_paths(kind: type[Section], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for key, field in kind.model_fields.items():
        section = section_in(field.annotation)
        paths += _known_paths(section, f"{prefix}{key}.") if section is not None else [prefix + key]
    return paths


def _without_numbers(location: str) -> str:
    return ".".join(part for part in location.split(".") if not part.isdigit())
