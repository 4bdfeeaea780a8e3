"""The page of a trace holds all of it, however odd its tokens, and little more than what changes from call to call."""

from __future__ import annotations

import json
from base64 import b64decode
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdseq.report.trace import Frame, Trace
from mdseq.report.trace_page import page_of, trace_data
from tests.report.traces import HOSTILE, emerging, frame


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and the text in each kind of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text: dict[str, str] = defaultdict(str)
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = f"{tag}#trace" if ("id", "trace") in attrs else tag
        self.elements.append(self.inside)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text[self.inside] += data


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    length = draw(st.integers(0, 8))
    pieces = st.sampled_from(HOSTILE) | st.text(max_size=3)
    frames = [
        Frame(
            call,
            draw(st.floats(0, 2000)),
            tuple(draw(st.lists(pieces, min_size=length, max_size=length))),
            tuple(draw(st.lists(st.floats(0, 1), min_size=length, max_size=length))),
        )
        for call in range(draw(st.integers(1, 4)))
    ]
    return Trace(draw(pieces), tuple(draw(st.lists(st.booleans(), min_size=length, max_size=length))), tuple(frames))


@given(traces())
@example(Trace(HOSTILE[0], (False,) * len(HOSTILE), (frame(*HOSTILE), frame(*HOSTILE[::-1], call=1))))
def test_the_page_holds_the_trace(trace: Trace) -> None:
    page = Page(page_of(trace))
    data = json.loads(page.text["script#trace"])
    assert [digit == "1" for digit in data["given"]] == list(trace.given)
    tokens = [""] * len(trace.given)
    for frame_data, expected in zip(data["frames"], trace.frames, strict=True):
        places = np.cumsum(frame_data["gaps"], dtype=int) - 1
        for place, token in zip(places, frame_data["tokens"], strict=True):
            tokens[place] = data["pieces"][token]
        assert tuple(tokens) == expected.pieces
        percent = np.frombuffer(b64decode(frame_data["percent"]), dtype=np.uint8)
        np.testing.assert_allclose(percent, 100 * np.array(expected.confidence), atol=0.5)
        assert (frame_data["call"], frame_data["timestep"]) == (expected.call, expected.timestep)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_tokens_and_titles_make_no_elements(hostile: str) -> None:
    harmless = Page(page_of(Trace("title", (False,), (frame("piece"),))))
    page = Page(page_of(Trace(hostile, (False,), (frame(hostile),))))
    assert page.elements == harmless.elements
    assert page.text["script"] == harmless.text["script"]
    assert page.text["title"] == hostile.replace("\udce2", "\ufffd")


def test_nothing_comes_from_elsewhere() -> None:
    page = page_of(emerging("A river."))
    assert "default-src 'none'" in page
    for address in ("http:", "https:", "src=", "@import", "url("):
        assert address not in page


def test_only_what_changes_is_written() -> None:
    still = Trace("", (False,) * 3, tuple(frame("a", "b", "c", call=call) for call in range(3)))
    assert [data["tokens"] for data in trace_data(still)["frames"]] == [[0, 1, 2], [], []]


def test_a_long_trace_is_a_small_file() -> None:
    """Twenty calls over 4,096 tokens, and none like the one before."""
    rng = np.random.default_rng(0)
    token_cl = rng.integers(0, 32_000, (20, 4096))
    frames = tuple(
        Frame(c, 0.0, tuple(f" word{token}" for token in token_cl[c]), tuple(rng.random(4096))) for c in range(20)
    )
    assert len(page_of(Trace("", (False,) * 4096, frames)).encode()) < 2_000_000
