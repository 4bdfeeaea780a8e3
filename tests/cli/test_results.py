"""Texts that are collected over several commands, as if it had been one."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mdseq.cli.results import FileResults, PrintedResults
from mdseq.errors import UserError

NUM = 12
TEXTS = [f"text {number}\n\u2028 \u00e9 \ufffd" * (1 + number % 3) for number in range(NUM)]
SETTINGS = {"the model": "that of step 4", "--steps": "20"}


def render(index: int, text: str) -> str:
    return json.dumps([index, text])


def results(path: Path, settings: dict[str, str] = SETTINGS) -> FileResults:
    return FileResults(path, settings, NUM, render)


def write(path: Path, order: list[int], stop_after: int = NUM) -> list[int]:
    """Add what is missing in some order, as far as one gets; gives what had to be added."""
    with results(path) as found:
        missing = [index for index in order if index not in found.done][:stop_after]
        for index in missing:
            found.add(index, TEXTS[index])
        if len(found.done) == NUM:
            found.finish()
    return missing


@pytest.fixture
def undisturbed(tmp_path: Path) -> bytes:
    path = tmp_path / "undisturbed.jsonl"
    write(path, list(range(NUM)))
    return path.read_bytes()


def test_the_file_is_in_order_and_alone(tmp_path: Path, undisturbed: bytes) -> None:
    assert undisturbed.decode() == "".join(render(index, text) + "\n" for index, text in enumerate(TEXTS))
    write(tmp_path / "out.jsonl", [7, 0, 11, 3, 4, 5, 6, 1, 2, 10, 9, 8])
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "undisturbed.jsonl"]


@pytest.mark.parametrize("seed", range(30))
def test_killed_anywhere_it_goes_on_and_comes_out_the_same(tmp_path: Path, undisturbed: bytes, seed: int) -> None:
    rng = random.Random(seed)
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    order = rng.sample(range(NUM), NUM)
    write(path, order, stop_after=rng.randint(1, NUM - 1))
    assert not path.exists()
    whole = part.read_bytes()
    cut = rng.randint(0, len(whole))
    part.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    assert len(write(path, rng.sample(range(NUM), NUM))) == NUM - kept
    assert path.read_bytes() == undisturbed
    assert not part.exists()


def test_a_line_that_was_damaged_ends_what_is_kept(tmp_path: Path, undisturbed: bytes) -> None:
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    write(path, list(range(NUM)), stop_after=6)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:4], b"\0" * 20 + b"\n", *lines[5:]]))
    assert write(path, list(range(NUM))) == list(range(3, NUM))
    assert path.read_bytes() == undisturbed


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, list(range(NUM)), stop_after=5)
    before = (tmp_path / "out.jsonl.part").read_bytes()
    other = {"the model": "that of step 8", "--steps": "20", "--clamp": "True"}
    with pytest.raises(UserError) as raised, results(path, other):
        pass
    assert "holds 5 texts of another command" in str(raised.value)
    assert "the model was that of step 4 and is that of step 8 now; --clamp was not given and is True now" in str(
        raised.value
    )
    assert "--steps" not in str(raised.value)
    assert "remove it to start over" in str(raised.value)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before


def test_other_settings_do_no_harm_before_the_first_text(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "out.jsonl"
    with results(path, {"--steps": "3"}):
        pass
    write(path, list(range(NUM)))
    assert path.read_bytes() == undisturbed


def test_a_file_of_the_user_is_no_part(tmp_path: Path) -> None:
    for content in (b"my notes\n", b'{"a": 1}\n', b"my notes"):
        (tmp_path / "out.jsonl.part").write_bytes(content)
        with pytest.raises(UserError, match="is no part of an output"), results(tmp_path / "out.jsonl"):
            pass
        assert (tmp_path / "out.jsonl.part").read_bytes() == content


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, list(range(NUM)), stop_after=NUM - 1)
    path.write_text("a holiday")
    with pytest.raises(UserError, match="is never overwritten"):
        write(path, list(range(NUM)))
    assert path.read_text() == "a holiday"


def test_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with results(path), pytest.raises(UserError, match="is being written by another process"), results(path):
        pass


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as writing can tell: the system refuses to make a file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_loses_nothing(tmp_path: Path, undisturbed: bytes) -> None:
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    write(path, list(range(NUM)), stop_after=4)
    size = part.stat().st_size
    with files_of_at_most(size + 5), pytest.raises(UserError, match="4 of 12 texts are kept in"):
        write(path, list(range(NUM)))
    assert part.stat().st_size == size
    write(path, list(range(NUM)), stop_after=7)
    with results(path) as found:
        found.add(NUM - 1, TEXTS[NUM - 1])
        with files_of_at_most(100), pytest.raises(UserError, match="12 of 12 texts are kept"):
            found.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl.part", "undisturbed.jsonl"]
    assert write(path, list(range(NUM))) == []
    assert path.read_bytes() == undisturbed


@pytest.mark.parametrize("place", ["absent/out.jsonl", "file/out.jsonl"])
def test_no_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write"), results(tmp_path / place):
        pass


def test_printed_texts_come_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    show: Callable[[int, str], str] = lambda index, text: f"{index} {text}"  # noqa: E731
    with PrintedResults(show) as printed:
        printed.add(1, "b")
        assert capsys.readouterr().out == ""
        printed.add(0, "a")
        assert capsys.readouterr().out == "0 a\n1 b\n"
        printed.add(2, "c")
        printed.finish()
    assert capsys.readouterr().out == "2 c\n"
