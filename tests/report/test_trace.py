"""A trace knows how far each call is, and its file appears whole, once, in the form that its name asks for."""

from __future__ import annotations

import resource
import tomllib
from pathlib import Path

import numpy as np
import pytest

from mdseq.errors import UserError
from mdseq.report.trace import Frame, Trace, check_trace_path, write_trace
from tests.report.traces import emerging, frame

BEGINNINGS = {".html": b"<!doctype html>", ".gif": b"GIF89a", ".png": b"\x89PNG"}
SMALL = emerging("A river runs past an old mill.", num_given=2, num_calls=4)


def share_final_by_hand(trace: Trace, c: int) -> float:
    generated = [i for i, given in enumerate(trace.given) if not given]
    final = [i for i in generated if len({frame.pieces[i] for frame in trace.frames[c:]}) == 1]
    return len(final) / len(generated)


@pytest.mark.parametrize("num_calls", [1, 2, 20])
def test_how_far_each_call_is(num_calls: int) -> None:
    trace = emerging("The river runs past an old mill, and dreams.", num_given=3, num_calls=num_calls)
    confidence_c = [np.mean(frame.confidence[3:]) for frame in trace.frames]
    np.testing.assert_allclose(trace.mean_confidence_c, confidence_c)
    np.testing.assert_allclose(trace.final_share_c, [share_final_by_hand(trace, c) for c in range(num_calls)])
    np.testing.assert_allclose(trace.noise_c, [frame.timestep / 1999.0 for frame in trace.frames])
    assert trace.final_share_c[-1] == 1.0


def test_a_token_that_returns_has_changed_twice_and_was_not_final() -> None:
    trace = Trace("", (False, False), (frame("a", "b"), frame("c", "b", call=1), frame("a", "b", call=2)))
    assert trace.changed_cl.tolist() == [[False, False], [True, False], [True, False]]
    assert trace.final_share_c.tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("pieces", [(), ("a", "b")])
def test_nothing_was_generated(pieces: tuple[str, ...]) -> None:
    trace = Trace("", (True,) * len(pieces), (frame(*pieces), frame(*pieces, call=1)))
    assert trace.mean_confidence_c.tolist() == trace.final_share_c.tolist() == [1.0, 1.0]
    assert trace.noise_c.tolist() == [0.0, 0.0]


def test_confidence_is_rounded_into_percent() -> None:
    trace = Trace("", (False,) * 4, (Frame(0, 0.0, tuple("abcd"), (0.004, 0.996, 1.0000001, -1e-9)),))
    assert trace.percent_cl.tolist() == [[0, 100, 100, 0]]


@pytest.mark.parametrize("name", ["a.html", "a.gif", "a.png", "A.PNG"])
@pytest.mark.parametrize(
    "trace",
    [
        SMALL,
        Trace("one call", (True, False), (frame("a", " b"),)),
        Trace("no tokens", (), (frame(), frame(call=1))),
        Trace("", (False,) * 4, (frame("", "\n\n", "\udce2", "\x00\u2028\r\t"),)),
    ],
    ids=["small", "one call", "no tokens", "odd pieces"],
)
def test_every_form_is_written(trace: Trace, name: str, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(BEGINNINGS[Path(name).suffix.lower()])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["trace", "trace.jpg", "trace.html.gz", ".html"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    for refuses in (check_trace_path, lambda path: write_trace(SMALL, path)):
        with pytest.raises(UserError, match=r"end in \.html, \.gif or \.png"):
            refuses(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_an_existing_file_is_never_overwritten(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"trace{suffix}"
    path.write_text("mine")
    for refuses in (check_trace_path, lambda path: write_trace(SMALL, path)):
        with pytest.raises(UserError, match=r"exists and is never overwritten; remove it"):
            refuses(path)
    assert path.read_text() == "mine"


def test_nor_is_one_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.html"

    def slow_page(trace: Trace) -> str:
        path.write_text("mine")
        return ""

    monkeypatch.setattr("mdseq.report.trace_page.page_of", slow_page)
    with pytest.raises(UserError, match="exists and is never overwritten"):
        write_trace(SMALL, path)
    assert path.read_text() == "mine"


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "trace.html").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="exists"):
        write_trace(SMALL, tmp_path / "trace.html")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("place", ["missing/trace.html", "file/trace.html", f"{'long' * 100}.html"])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; choose another place"):
        write_trace(SMALL, tmp_path / place)


def test_a_file_that_cannot_be_completed_is_removed(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*; make room"):
            write_trace(SMALL, tmp_path / "trace.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_parts_of_the_page_are_shipped() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {path.name for path in (root / "mdseq" / "report").iterdir() if path.suffix not in ("", ".py")}
    assert set(project["tool"]["setuptools"]["package-data"]["mdseq.report"]) == parts
