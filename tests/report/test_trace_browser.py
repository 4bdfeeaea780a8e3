"""The page of a trace, used as a reader uses it: by slider, keys, mouse and touch, in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdseq.report.trace import Frame, Trace, write_trace
from tests.report.traces import HOSTILE, emerging, frame

pytest.importorskip("selenium", reason="drives the browser")

from selenium.common.exceptions import NoAlertPresentException, SessionNotCreatedException
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement

from tests.report.browser import chromium, why_missing

pytestmark = pytest.mark.skipif(bool(why_missing()), reason=why_missing())

NUM_CALLS = 6
STORY = emerging("The river runs past an old mill. " * 4, num_given=5, num_calls=NUM_CALLS, title="A river")


class Reader:
    """One who looks at a page, and moves through it."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def open(self, path: Path) -> None:
        for log in ("browser", "performance"):
            self.browser.get_log(log)  # what was said of the page before
        self.browser.get(path.as_uri())

    def evaluate(self, expression: str) -> Any:
        return self.browser.execute_script(f"return {expression}")

    def emulate(self, command: str, **parameters: Any) -> None:
        self.browser.execute_cdp_cmd(f"Emulation.{command}", parameters)

    def element(self, selector: str) -> WebElement:
        return self.browser.find_element("css selector", selector)

    @property
    def call(self) -> str:
        return self.element("#call").text

    @property
    def pieces(self) -> tuple[str, ...]:
        spans = "[...document.querySelectorAll('#text > span')]"
        return tuple(self.evaluate(f"{spans}.map((span) => span.textContent.toWellFormed())"))

    @property
    def looks(self) -> list[str]:
        return self.evaluate("[...document.querySelectorAll('#text > span')].map((span) => span.className)")

    @property
    def detail(self) -> str:
        """What is said of a token; empty when nothing is."""
        return self.element("#detail").text

    def token(self, i: int) -> WebElement:
        return self.element(f"#text > span:nth-child({i + 1})")

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def middle_of(self, element: WebElement) -> tuple[float, float]:
        box = self.browser.execute_script("return arguments[0].getClientRects()[0]", element)
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(self, *path: tuple[float, float]) -> None:
        """A finger that comes down, moves along the path, and goes up."""
        moves = [("touchStart", path[0]), *(("touchMove", point) for point in path[1:])]
        for kind, (x, y) in moves:
            self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def swipe(self, right: float, down: float = 0.0) -> None:
        """A finger that moves over the text, by that many pixels."""
        x, y = self.middle_of(self.token(len(STORY.given) // 2))
        self.touch((x, y), *((x + right * step / 4, y + down * step / 4) for step in range(1, 5)))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def requested(self) -> set[str]:
        """Addresses that the page got the browser to ask for, unless its policy forbade it in time."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        failed = [event["params"] for event in events if event["method"] == "Network.loadingFailed"]
        forbidden = {event["requestId"] for event in failed if event.get("blockedReason") == "csp"}
        return {
            event["request"]["url"]
            for event in asked
            if event["documentURL"].startswith("file:") and event["requestId"] not in forbidden
        }


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it holds within a few seconds."""
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    try:
        started = chromium(tmp_path_factory.mktemp("profile"))
    except SessionNotCreatedException as error:
        pytest.skip(f"chromium does not start here: {error.msg}")
    yield started
    started.quit()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.html"
    write_trace(STORY, path)
    return path


@pytest.fixture
def reader(browser: Chrome, story: Path) -> Iterator[Reader]:
    """Before the story, at its first call; whatever it does, the page must not complain nor ask for anything."""
    reader = Reader(browser)
    reader.open(story)
    yield reader
    reader.emulate("clearDeviceMetricsOverride")
    reader.emulate("setTouchEmulationEnabled", enabled=False)
    reader.emulate("setEmulatedMedia", features=[])
    assert reader.complaints() == []
    assert reader.requested() - {"data:,"} == {reader.browser.current_url}


@pytest.fixture
def finger(reader: Reader) -> Reader:
    """On a phone."""
    reader.emulate("setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    reader.emulate("setTouchEmulationEnabled", enabled=True)
    return reader


def test_the_slider_moves_through_the_calls(reader: Reader) -> None:
    reader.element("#slider").click()  # on its middle
    for number in range(NUM_CALLS):
        while reader.call != f"Call {number + 1} of {NUM_CALLS}":
            key = Keys.ARROW_LEFT if int(reader.call.split()[1]) > number + 1 else Keys.ARROW_RIGHT
            reader.element("#slider").send_keys(key)
        assert reader.pieces == STORY.frames[number].pieces
    assert (
        reader.element("#slider").get_attribute("aria-valuetext") == "Call 6 of 6, timestep 333.2 of 1,999, noise 17%"
    )


def test_a_token_is_coloured_by_its_confidence_and_marked_when_it_changes(reader: Reader) -> None:
    for number in (0, 1, NUM_CALLS - 1):
        reader.evaluate(f"go({number})")
        for i, look in enumerate(reader.looks):
            level = min(int(STORY.percent_cl[number, i]) // 10, 9)
            changed = number > 0 and STORY.frames[number].pieces[i] != STORY.frames[number - 1].pieces[i]
            newline = STORY.frames[number].pieces[i] == "\n"
            expected = f"token level-{level}{' changed' * changed}{' newline' * newline}"
            assert look == ("token given" if STORY.given[i] else expected)
    backgrounds = {
        reader.token(i).value_of_css_property("background-color") for i in range(len(STORY.given)) if STORY.given[i]
    }
    assert backgrounds == {"rgba(0, 0, 0, 0)"}


def test_only_tokens_that_differ_are_touched(reader: Reader) -> None:
    """The elements stay; an observer counts those whose text or look is set."""
    touched = """
        (() => {
          const observer = new MutationObserver(() => {});
          const spans = [...document.querySelectorAll("#text > span")];
          observer.observe(find("text"), { subtree: true, childList: true, characterData: true, attributes: true });
          go(%d);
          const records = observer.takeRecords();
          const token = (node) => spans.indexOf(node.nodeType === Node.TEXT_NODE ? node.parentNode : node);
          return {
            texts: records.filter((record) => record.type === "characterData").map((record) => token(record.target)),
            looks: records.filter((record) => record.type === "attributes").map((record) => token(record.target)),
            elements: records.filter((record) => record.type === "childList").length,
          };
        })()"""
    before = reader.looks
    found = reader.evaluate(touched.strip() % 1)
    first, second = STORY.frames[:2]
    assert found["texts"] == [i for i, piece in enumerate(second.pieces) if first.pieces[i] != piece]
    assert found["looks"] == [i for i, look in enumerate(reader.looks) if before[i] != look]
    assert found["elements"] == 0


def test_keys(reader: Reader) -> None:
    steps = [
        (Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_LEFT, 2), (Keys.END, 6), (Keys.ARROW_RIGHT, 6),
        (Keys.HOME, 1), (Keys.ARROW_LEFT, 1),
    ]  # fmt: skip
    for key, call in steps:
        reader.press(key)
        assert reader.call == f"Call {call} of {NUM_CALLS}"
        assert reader.pieces == STORY.frames[call - 1].pieces
        assert reader.element("#slider").get_attribute("value") == str(call - 1)


def test_the_space_bar_plays_to_the_end_and_again_from_the_beginning(reader: Reader) -> None:
    button = reader.element("#play")
    reader.press(" ")
    assert button.get_attribute("aria-label") == "Pause"
    assert soon(lambda: reader.call == "Call 2 of 6")
    reader.press(" ")
    assert button.get_attribute("aria-label") == "Play"
    reader.press(Keys.END, Keys.ARROW_LEFT, " ")
    assert soon(lambda: button.get_attribute("aria-label") == "Play")
    assert reader.call == "Call 6 of 6"
    button.click()
    assert reader.call == "Call 1 of 6"
    button.send_keys(" ")  # once, though both the page and the button know this key
    assert button.get_attribute("aria-label") == "Play"


def test_moving_by_hand_stops_the_playing(reader: Reader) -> None:
    reader.press(" ", Keys.END)
    assert reader.element("#play").get_attribute("aria-label") == "Play"


def test_who_prefers_less_motion_is_given_more_time(reader: Reader) -> None:
    reader.emulate("setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    reader.press(" ")
    time.sleep(0.8)
    assert reader.call == "Call 1 of 6"


def test_screen_readers_are_told_once_the_moves_have_ended(reader: Reader) -> None:
    status = "document.getElementById('status').textContent"
    assert soon(lambda: reader.evaluate(status).startswith("Call 1 of 6, mean confidence"))
    reader.press(*[Keys.ARROW_RIGHT] * 3)
    assert reader.evaluate(status).startswith("Call 1 of 6")
    assert soon(lambda: reader.evaluate(status).startswith("Call 4 of 6"))


def test_pointing_at_a_token_shows_what_it_was(reader: Reader) -> None:
    i = max(range(len(STORY.given)), key=lambda i: len({made.pieces[i] for made in STORY.frames}))
    reader.press(Keys.END)
    ActionChains(reader.browser).move_to_element(reader.token(i)).perform()
    assert f"token {i + 1} of {len(STORY.given)}, confidence {STORY.percent_cl[-1, i]}%" in reader.detail
    for piece in {made.pieces[i] for made in STORY.frames}:
        assert piece.replace(" ", "␣").replace("\n", "↵") in reader.detail
    ActionChains(reader.browser).move_to_element(reader.token(0)).perform()
    assert reader.detail.endswith("token 1 of 33, given")
    ActionChains(reader.browser).move_to_element(reader.element("h1")).perform()
    assert reader.detail == ""


def test_tokens_are_reached_by_keys(reader: Reader) -> None:
    reader.element("#slider").send_keys(Keys.TAB)
    assert "token 6 of 33, confidence" in reader.detail  # the first that was generated
    reader.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert "token 7 of 33" in reader.detail
    reader.press(Keys.ARROW_RIGHT)  # another call, the same token
    assert reader.call == "Call 2 of 6"
    assert f"token 7 of 33, confidence {STORY.percent_cl[1, 6]}%" in reader.detail
    described_by = reader.evaluate("document.activeElement.getAttribute('aria-describedby')")
    assert described_by == "detail"
    assert reader.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    reader.press(Keys.ESCAPE)
    assert reader.detail == ""
    reader.press(Keys.ENTER)
    assert "token 7 of 33" in reader.detail


def test_a_swipe_moves_by_a_call(finger: Reader) -> None:
    finger.swipe(right=-120)
    assert soon(lambda: finger.call == "Call 2 of 6")
    assert finger.pieces == STORY.frames[1].pieces
    finger.swipe(right=-120)
    finger.swipe(right=120)
    assert soon(lambda: finger.call == "Call 2 of 6")
    finger.swipe(right=20)  # too short
    finger.swipe(right=-100, down=80)  # neither here nor there
    finger.swipe(right=10, down=-150)  # this scrolls
    assert finger.call == "Call 2 of 6"


def test_a_tap_shows_what_a_token_was(finger: Reader) -> None:
    finger.touch(finger.middle_of(finger.token(9)))
    assert soon(lambda: "token 10 of 33, confidence" in finger.detail)
    finger.touch(finger.middle_of(finger.element("h1")))
    assert soon(lambda: finger.detail == "")


def test_the_slider_and_the_plot_are_dragged_by_a_finger(finger: Reader) -> None:
    slider = finger.evaluate("document.getElementById('slider').getBoundingClientRect()")
    y = slider["y"] + slider["height"] / 2
    finger.touch((slider["x"] + 10, y), (slider["x"] + 80, y), (slider["x"] + slider["width"] - 10, y))
    assert soon(lambda: finger.call == "Call 6 of 6")
    plot = finger.evaluate("document.getElementById('plot').getBoundingClientRect()")
    y = plot["y"] + plot["height"] / 2
    finger.touch((plot["x"] + plot["width"], y), (plot["x"] + plot["width"] / 2, y), (plot["x"] + plot["width"] / 5, y))
    assert soon(lambda: finger.call == "Call 2 of 6")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_never_wider_than_its_window(reader: Reader, width: int) -> None:
    reader.emulate("setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=False)
    for i in (0, len(STORY.given) - 1):
        reader.evaluate(f"focusToken({i}, false)")
        assert reader.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light(reader: Reader) -> None:
    colours = []
    for scheme in ("light", "dark"):
        reader.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(reader.element("body").value_of_css_property("background-color"))
    assert colours == ["rgba(255, 254, 251, 1)", "rgba(21, 23, 27, 1)"]


@pytest.mark.parametrize("title", HOSTILE[:3])
def test_hostile_tokens_are_text(reader: Reader, title: str, tmp_path: Path) -> None:
    frames = tuple(frame(*HOSTILE[c:], *HOSTILE[:c], call=c) for c in range(3))
    write_trace(Trace(title, (False,) * len(HOSTILE), frames), tmp_path / "hostile.html")
    kinds = "[...new Set([...document.querySelectorAll('*')].map((element) => element.localName))].sort()"
    harmless_kinds = reader.evaluate(kinds)
    reader.open(tmp_path / "hostile.html")
    for c in range(3):
        assert reader.pieces == tuple(piece.replace("\udce2", "\ufffd") for piece in frames[c].pieces)
        reader.evaluate("focusToken(0, false)")
        assert reader.element("#detail h2").text == frames[c].pieces[0].replace(" ", "␣")
        reader.press(Keys.ARROW_RIGHT)
    assert set(reader.evaluate(kinds)) <= {*harmless_kinds, "h2", "table", "tr", "td", "th"}
    assert reader.browser.title == title == reader.element("h1").text
    with pytest.raises(NoAlertPresentException):
        _ = reader.browser.switch_to.alert


def test_not_even_an_element_that_got_in_could_run_or_load(reader: Reader) -> None:
    harm = "<img src=x onerror='window.harm = 1'><img src=data:, onerror='window.harm = 2'><script>harm = 3</script>"
    reader.browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", harm)
    complaints: list[str] = []
    assert soon(lambda: bool(complaints.extend(reader.complaints()) or len(complaints) >= 2))
    assert all("Content Security Policy" in complaint for complaint in complaints)
    assert reader.evaluate("window.harm") is None


@pytest.mark.parametrize("pieces", [("One", " call"), ()])
def test_a_single_call(reader: Reader, pieces: tuple[str, ...], tmp_path: Path) -> None:
    write_trace(Trace("", (False,) * len(pieces), (frame(*pieces),)), tmp_path / "one.html")
    reader.open(tmp_path / "one.html")
    reader.press(Keys.ARROW_RIGHT, Keys.END, Keys.HOME, " ")
    assert reader.call == "Call 1 of 1"
    assert reader.pieces == pieces
    assert reader.element("#play").get_attribute("aria-label") == "Play"


def test_a_long_text_moves_without_lag(reader: Reader, tmp_path: Path) -> None:
    """Twenty calls over 4,096 tokens; a move is measured until the browser has laid out the text again."""
    whole = emerging(
        "The river runs past an old mill, where seven grey cats watch the silver fish. " * 250, num_calls=20
    )
    frames = tuple(Frame(f.call, f.timestep, f.pieces[:4096], f.confidence[:4096]) for f in whole.frames)
    write_trace(Trace("long", whole.given[:4096], frames), tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 500_000
    reader.open(tmp_path / "long.html")
    milliseconds = reader.evaluate(
        """
        frames.map((_, number) => {
          const start = performance.now();
          go(number);
          find("text").getBoundingClientRect();
          return performance.now() - start;
        })""".strip()
    )
    assert len(reader.pieces) == 4096
    assert sorted(milliseconds)[10] < 250, milliseconds
