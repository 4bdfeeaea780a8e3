"""The pictures of a trace: words stay whole, every call has its frame, and what is left out is said."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from mdseq.report.trace import Frame, Trace
from mdseq.report.trace_colours import DARK, LIGHT, NUM_LEVELS, Palette, level_of
from mdseq.report.trace_image import MOST_TOKENS, Excerpt, animation_of, still_of
from mdseq.report.trace_layout import EMPTY, NEWLINE, lay_out
from tests.report.traces import emerging, frame


def lines_of(pieces: list[str], width: int) -> list[str]:
    """Laid out with letters of width 1; a bar where a token ends and the next begins."""
    lines: dict[int, list[str]] = {}
    for run in lay_out(pieces, len, width):
        lines.setdefault(run.line, []).append(run.text)
    return ["|".join(lines.get(line, [])) for line in range(max(lines, default=-1) + 1)]


def picture(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content))


def colours_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def luminance(colour: str) -> float:
    """Of WCAG 2, from 0 to 1."""
    share = np.array(ImageColor.getrgb(colour)) / 255
    return float(np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_words_of_several_tokens_stay_whole() -> None:
    assert lines_of(["The", " miller", "'", "s", " daugh", "ter"], width=12) == ["The| |miller|'|s", "daugh|ter"]


def test_newlines_end_lines_and_a_wide_word_is_broken() -> None:
    assert lines_of(["a", "\n\n", "  b"], width=9) == ["a|↵", "↵", "  |b"]
    assert lines_of(["ab", "cdefghij"], width=4) == ["ab|cd", "efgh", "ij"]
    assert lines_of(["to ", "abc", "defgh"], width=4) == ["to| ", "abc|d", "efgh"]


def test_what_a_font_cannot_draw_is_replaced() -> None:
    assert lines_of(["", "a\tb", "\x00", "\udce2", "c\u2028d\r"], width=99) == [
        f"{EMPTY}|a|    |b|\ufffd|\ufffd|c| |d| "
    ]


@given(st.lists(st.text("ab \n", max_size=12), max_size=12), st.integers(1, 9))
def test_nothing_is_lost_and_nothing_is_too_wide(pieces: list[str], width: int) -> None:
    runs = lay_out(pieces, len, width)
    for token, piece in enumerate(pieces):
        drawn = "".join(run.text for run in runs if run.token == token)
        kept = piece.replace(" ", "").replace("\n", NEWLINE) or ("" if piece else EMPTY)
        assert drawn.replace(" ", "") == kept
    assert [(run.line, run.x) for run in runs] == sorted((run.line, run.x) for run in runs)
    assert all(run.x + run.width <= width for run in runs if run.text != NEWLINE)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_scale_can_be_read(palette: Palette) -> None:
    """Contrast as WCAG 2 asks for text, and a lightness that orders the scale without any hue."""
    assert len(palette.levels) == NUM_LEVELS
    assert all(contrast(level, palette.ink) >= 4.5 for level in palette.levels)
    assert all(contrast(palette.faint, below) >= 4.5 for below in (palette.paper, palette.raised))
    assert contrast(palette.accent, palette.paper) >= 3.0
    from_paper = [contrast(level, palette.paper) for level in palette.levels]
    assert from_paper == sorted(from_paper, reverse=True)
    assert from_paper[-1] > 1.15  # a sure token still differs from a given one


def test_levels_are_tenths() -> None:
    assert [level_of(percent) for percent in (0, 9, 10, 55, 90, 99, 100)] == [0, 0, 1, 5, 9, 9, 9]


@pytest.mark.parametrize("num_calls", [1, 2, 7, 30])
def test_an_animation_has_a_frame_for_each_call(num_calls: int) -> None:
    animation = picture(animation_of(emerging("A river runs past an old mill.", num_given=2, num_calls=num_calls)))
    assert animation.n_frames == num_calls
    durations = []
    for number in range(num_calls):
        animation.seek(number)
        durations.append(animation.info["duration"])
    assert durations == ([400] * 29 if num_calls == 30 else [500] * (num_calls - 1)) + [3000]


def test_so_it_has_when_nothing_changes() -> None:
    trace = Trace("", (False,), tuple(frame("a", call=call, timestep=9.0) for call in range(6)))
    assert picture(animation_of(trace)).n_frames == 6


def test_pictures_have_the_colours_of_the_page() -> None:
    trace = Trace(
        "", (False, False, True), tuple(Frame(call, 0.0, tuple("abc"), (0.05, 0.95, 1.0)) for call in range(2))
    )
    expected = {ImageColor.getrgb(colour) for colour in (*LIGHT.levels, LIGHT.paper, LIGHT.ink)}
    animation = picture(animation_of(trace))
    for number in range(2):
        animation.seek(number)
        assert expected <= colours_in(animation)
    assert expected <= colours_in(picture(still_of(trace)))


def test_a_given_token_has_no_colour() -> None:
    """A sure token covers more of a picture than its place in the legend; a given one does not."""

    def sure_pixels(is_given: bool) -> int:
        trace = Trace("", (is_given,) * 30, (frame(*["word "] * 30, confidence=1.0),))
        image = np.asarray(picture(still_of(trace)).convert("RGB"))
        return int((image == ImageColor.getrgb(LIGHT.levels[-1])).all(axis=-1).sum())

    assert sure_pixels(is_given=True) < 2000
    assert sure_pixels(is_given=False) > 20_000


def test_a_still_is_as_wide_as_a_page_and_not_blank() -> None:
    still = picture(still_of(emerging("The river runs past an old mill, and dreams of snow. " * 6, num_calls=20)))
    assert still.info["dpi"] == pytest.approx((300, 300), abs=1)
    assert still.width == 1950
    assert np.asarray(still.convert("L")).std() > 20


def test_the_first_tokens_are_shown() -> None:
    def excerpt(length: int, num_given: int) -> Excerpt:
        given = tuple(i < num_given for i in range(length))
        return Excerpt.of(Trace("", given, (frame(*"a" * length),)))

    whole = excerpt(MOST_TOKENS, num_given=150)
    assert (whole.start, whole.stop) == (0, MOST_TOKENS)
    assert whole.summary == "200 tokens, 1 denoiser call"
    assert excerpt(4096, num_given=50).summary == "tokens 1 to 200 of 4,096, 1 denoiser call"


def test_tokens_that_were_generated_are_shown_however_many_were_given() -> None:
    for length, num_given in ((4096, 3000), (1000, 990), (300, 300)):
        given = tuple(i < num_given for i in range(length))
        excerpt = Excerpt.of(Trace("", given, (frame(*"a" * length),)))
        assert excerpt.stop - excerpt.start == MOST_TOKENS
        assert excerpt.start <= min(num_given, length - 1) or num_given == length
        assert excerpt.stop > num_given or num_given == length


def test_noise_of_many_newlines_does_not_make_a_picture_tall() -> None:
    quiet = [frame(*["a "] * 150, call=call) for call in range(3)]
    noisy = [frame(*["\n"] * 150), *quiet[1:]]
    for form in (animation_of, still_of):
        heights = [picture(form(Trace("", (False,) * 150, tuple(frames)))).height for frames in (quiet, noisy)]
        assert heights[1] < 1.4 * heights[0]
