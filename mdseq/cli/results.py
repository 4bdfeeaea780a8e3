"""Where texts go: to standard output as they come, or to a file that exists whole or not at all.

Texts of a file are collected beside it, in `FILE.part`: its first line says what was asked for, every other holds one
text and its index. So a command that was interrupted goes on where it stopped, and only if it asks for the same.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, Self

from mdseq.errors import UserError
from mdseq.files import sync_folder

Render = Callable[[int, str], str]


class Results(Protocol):
    """Takes texts by their index, in any order."""

    @property
    def done(self) -> Collection[int]:
        """Indices of the texts that are there already."""

    def __enter__(self) -> Self: ...

    def state(self) -> str:
        """How far it is, for people."""

    def add(self, index: int, text: str) -> None: ...

    def finish(self) -> None:
        """All texts are there."""

    def __exit__(self, *_: object) -> None: ...


class PrintedResults:
    """Prints each text, in the order of their indices, as soon as those before it are there.

    Args:
        render: The lines to print for an index and its text.
    """

    def __init__(self, render: Render) -> None:
        self.done = ()
        self._render = render
        self._waiting: dict[int, str] = {}
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def state(self) -> str:
        return f"{self._next} texts are printed"

    def add(self, index: int, text: str) -> None:
        self._waiting[index] = text
        while self._next in self._waiting:
            print(self._render(self._next, self._waiting.pop(self._next)), flush=True)
            self._next += 1

    def finish(self) -> None:
        assert not self._waiting

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""


class FileResults:
    """Collects texts in a part file, and makes the file of them when all are there.

    Args:
        path: The file, not there yet.
        settings: What was asked for, by names that the user knows; a part file of other settings is not continued.
        num_texts: How many there will be.
        render: The line to write for an index and its text.

    Raises:
        UserError: The file cannot be written or is being written, or its part was made by another command.
    """

    def __init__(self, path: Path, settings: dict[str, str], num_texts: int, render: Render) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._settings = settings
        self._num_texts = num_texts
        self._render = render
        self._place: dict[int, int] = {}  # where the line of each text starts in the part file
        self._end = 0

    @property
    def done(self) -> Collection[int]:
        return self._place.keys()

    def __enter__(self) -> Self:
        try:
            self._file = self._part.open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self._part} is being written by another process; wait for it to end") from None
        except OSError as error:
            raise UserError(f"cannot write {self._part}: {error.strerror}; choose another --output") from None
        try:
            self._go_on()
        except BaseException:
            self._file.close()
            raise
        return self

    def state(self) -> str:
        return f"{len(self._place)} of {self._num_texts} texts are kept in {self._part}"

    def add(self, index: int, text: str) -> None:
        place = self._end
        self._append({"index": index, "text": text})
        self._place[index] = place

    def finish(self) -> None:
        """Write the file in the order of the indices; it has another name until all of it is on disk."""
        assert len(self._place) == self._num_texts
        unfinished = self._path.with_name(self._path.name + ".unfinished")
        try:
            with self._part.open("rb") as part, unfinished.open("wb") as file:
                for index in range(self._num_texts):
                    part.seek(self._place[index])
                    file.write(self._render(index, json.loads(part.readline())["text"]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            require_writable(self._path)
            unfinished.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise self._kept(self._path, error) from None
        self._part.unlink()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _go_on(self) -> None:
        """Read what an earlier command left; a last line that was cut short is dropped."""
        with self._part.open("rb") as part:
            first = part.readline()
            settings = _parsed(first)
            if first and "settings" not in settings and not _HEADER.startswith(first[: len(_HEADER)]):
                raise UserError(f"{self._part} is no part of an output; move it away, or choose another --output")
            end = len(first)
            for line in part:
                entry = _parsed(line)
                if not entry:
                    break
                self._place[entry["index"]] = end
                end += len(line)
        if self._place:
            self._require_same(settings["settings"])
        else:
            end = 0
        self._file.truncate(end)
        self._end = end
        if not end:
            self._append({"settings": self._settings})

    def _require_same(self, earlier: dict[str, str]) -> None:
        names = [*earlier, *(name for name in self._settings if name not in earlier)]
        changes = [
            f"{name} was {earlier.get(name, 'not given')} and is {self._settings.get(name, 'not given')} now"
            for name in names
            if earlier.get(name) != self._settings.get(name)
        ]
        if changes:
            raise UserError(
                f"{self._part} holds {len(self._place)} texts of another command: {'; '.join(changes)}. Give the "
                f"command that it began with to go on, or remove it to start over, or choose another --output"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._end)
            raise self._kept(self._part, error) from None
        self._end += len(line)

    def _kept(self, path: Path, error: OSError) -> UserError:
        return UserError(
            f"cannot write {path}: {error.strerror}; {self.state()}: mend that, then the same command goes on from "
            "there"
        )


_HEADER = b'{"settings": '


def _parsed(line: bytes) -> dict[str, Any]:
    """The object of a line, or an empty one where the line is not whole."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def require_writable(path: Path) -> None:
    """Raises UserError: there is a file already, or no folder for it."""
    if path.exists():
        raise UserError(f"{path} exists and is never overwritten; remove it, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another")
