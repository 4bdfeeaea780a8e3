"""A trace as an animation for slides, and as a still for papers: its first tokens, in the colours of the page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

from mdseq.report.trace import Trace
from mdseq.report.trace_colours import LIGHT, level_of
from mdseq.report.trace_drawing import LINE_HEIGHT, Sheet, TokenLook, blend, font_of, margins
from mdseq.report.trace_layout import Run, lay_out

MOST_TOKENS = 200
MOST_LINES = 28
STILL_CALLS = 5
_BEFORE = 24  # given tokens shown before the first that was generated, where there are too many of them
_SPARE_LINES = 2  # noise may take some more lines than the text that comes of it
_STILL_WIDTH, _STILL_SIZE = 1950, 29  # 6.5 inches at 300 dots an inch, a font of 7 points
_ANIMATION_WIDTH, _ANIMATION_SIZE = 1280, 23
_SHADES = 15  # between a background and what is written on it


@dataclass(frozen=True)
class Excerpt:
    """The tokens of a trace that a picture has room for: [start, stop)."""

    trace: Trace
    start: int
    stop: int

    @classmethod
    def of(cls, trace: Trace) -> Excerpt:
        """The first tokens; where most of them were given, those around the first that was generated."""
        length = len(trace.given)
        first = trace.given.index(False) if False in trace.given else 0
        start = max(0, min(first - _BEFORE, length - MOST_TOKENS)) if first >= MOST_TOKENS // 2 else 0
        return cls(trace, start, min(start + MOST_TOKENS, length))

    @property
    def summary(self) -> str:
        length = len(self.trace.given)
        is_whole = self.stop - self.start == length
        tokens = f"{length:,} tokens" if is_whole else f"tokens {self.start + 1:,} to {self.stop:,} of {length:,}"
        return f"{tokens}, {self.trace.num_calls:,} denoiser call{'' if self.trace.num_calls == 1 else 's'}"

    def runs(self, c: int, size: int, width: float) -> list[Run]:
        """Its tokens at one call, in lines; they count from `start`."""
        return lay_out(
            self.trace.frames[c].pieces[self.start : self.stop], font_of("DejaVuSerif", size).getlength, width
        )

    def looks(self, c: int) -> list[TokenLook]:
        return [
            TokenLook(None if given else level_of(percent), changed)
            for given, percent, changed in zip(
                self.trace.given[self.start : self.stop],
                self.trace.percent_cl[c, self.start : self.stop].tolist(),
                self.trace.changed_cl[c, self.start : self.stop].tolist(),
                strict=True,
            )
        ]

    def facts(self, c: int) -> tuple[str, str, str]:
        """What there is to say of one call, about all tokens of the trace."""
        return (
            f"timestep {self.trace.frames[c].timestep:,.0f}",
            f"mean confidence {self.trace.mean_confidence_c[c]:.0%}",
            f"already final {self.trace.final_share_c[c]:.0%}",
        )


def still_of(trace: Trace) -> bytes:
    """A PNG of a handful of calls, evenly spaced from the first to the last, one below the other."""
    size, excerpt = _STILL_SIZE, Excerpt.of(trace)
    left, right = margins(_STILL_WIDTH, size)
    text_left = left + 9 * size
    calls = np.unique(np.linspace(0, len(trace.frames) - 1, STILL_CALLS).round().astype(int)).tolist()
    runs_of = {c: excerpt.runs(c, size, right - text_left) for c in calls}
    most = _most_lines(runs_of[calls[-1]])
    height_of = {
        c: round((max(3, min(_num_lines(runs), most)) * LINE_HEIGHT + 1.3) * size) for c, runs in runs_of.items()
    }
    y = 5 * size
    sheet = Sheet(_STILL_WIDTH, y + sum(height_of.values()) + 3 * size, size)
    sheet.heading(trace.title, excerpt.summary)
    for c in calls:
        sheet.rule(y)
        top = y + round(0.75 * size)
        sheet.text(left, top + 0.2 * size, f"call {trace.frames[c].call + 1:,}", 0.9, "DejaVuSans-Bold")
        for line, fact in enumerate(excerpt.facts(c), start=1):
            sheet.text(left, top + (0.35 + 1.25 * line) * size, fact, 0.72)
        sheet.tokens(text_left, top, runs_of[c], excerpt.looks(c), most)
        y += height_of[c]
    sheet.rule(y)
    sheet.legend(y + size)
    content = BytesIO()
    _in_palette(sheet.image).save(content, "PNG", dpi=(300, 300))
    return content.getvalue()


def animation_of(trace: Trace) -> bytes:
    """A GIF of all calls, over and over, resting at the last."""
    size, excerpt = _ANIMATION_SIZE, Excerpt.of(trace)
    left, right = margins(_ANIMATION_WIDTH, size)
    count = len(trace.frames)
    runs_c = [excerpt.runs(c, size, right - left) for c in range(count)]
    most = _most_lines(runs_c[-1])
    bottom = round((5 + LINE_HEIGHT * min(max(map(_num_lines, runs_c)), most)) * size) + size
    pictures = []
    for c, runs in enumerate(runs_c):
        sheet = Sheet(_ANIMATION_WIDTH, bottom + 6 * size, size)
        sheet.heading(trace.title, excerpt.summary)
        sheet.tokens(left, 5 * size, runs, excerpt.looks(c), most)
        sheet.track(bottom, c / (count - 1) if count > 1 else 1.0)
        call = f"call {trace.frames[c].call + 1:,} of {trace.num_calls:,}"
        sheet.text(left, bottom + size, call, 0.9, "DejaVuSans-Bold")
        sheet.text(right, bottom + size, " · ".join(excerpt.facts(c)), 0.75, to_right=True)
        sheet.legend(bottom + 3 * size)
        pictures.append(_in_palette(sheet.image))
    milliseconds = round(max(80, min(500, 12_000 / count)))
    content = BytesIO()
    pictures[0].save(
        content,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[milliseconds] * (count - 1) + [3000],
        loop=0,
        optimize=False,  # would give each picture a palette of its own
    )
    return content.getvalue()


def _num_lines(runs: Sequence[Run]) -> int:
    return runs[-1].line + 1 if runs else 1


def _most_lines(last_runs: Sequence[Run]) -> int:
    """Lines that any call may take: few more than the finished text, however many newlines the noise holds."""
    return min(_num_lines(last_runs) + _SPARE_LINES, MOST_LINES)


def _in_palette(image: Image.Image) -> Image.Image:
    """A byte for each pixel."""
    return image.quantize(palette=_palette(), dither=Image.Dither.NONE)


@cache
def _palette() -> Image.Image:
    """The colours of every picture: what is written on what, and the edges between."""
    written = [(paper, LIGHT.ink) for paper in (LIGHT.paper, *LIGHT.levels)] + [(LIGHT.paper, LIGHT.faint)]
    colours = [blend(*pair, shade / _SHADES) for pair in written for shade in range(_SHADES + 1)]
    colours += [blend(colour, colour, 0) for colour in (LIGHT.rule, LIGHT.accent)]
    assert len(colours) <= 256
    image = Image.new("P", (1, 1))
    image.putpalette(list(itertools.chain.from_iterable(colours)))
    return image
