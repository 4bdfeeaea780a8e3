"""What the pictures of a trace are made of: text in a font that is always there, coloured tokens, the legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

from mdseq.report.trace_colours import LIGHT
from mdseq.report.trace_layout import NEWLINE, Run, lay_out

LINE_HEIGHT = 1.75  # in font sizes

Font = Literal["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold"]


@dataclass(frozen=True)
class TokenLook:
    """How a token is drawn.

    Attributes:
        level: Of its confidence; None for a given token, which has no colour.
        changed: Whether it is another than at the call before.
    """

    level: int | None
    changed: bool


class Sheet:
    """A picture that is being drawn; everything is measured in sizes of its text's font.

    Attributes:
        size: Of that font, in pixels.
        image: The picture.
        left, right: Its margins, in pixels.
    """

    def __init__(self, width: int, height: int, size: int) -> None:
        self.size = size
        self.image = Image.new("RGB", (width, height), LIGHT.paper)
        self.left, self.right = margins(width, size)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, scale: float, font: Font = "DejaVuSans", to_right: bool = False
    ) -> None:
        """One line, its top at y; bold in ink, else faint. `to_right`: x is where it ends."""
        colour = LIGHT.ink if font.endswith("Bold") else LIGHT.faint
        drawn = font_of(font, round(scale * self.size))
        self._draw.text((x, y), text, colour, drawn, anchor="ra" if to_right else "la")

    def heading(self, title: str, summary: str) -> None:
        """The title, as much as a line holds, and a line below it."""
        font = font_of("DejaVuSerif-Bold", round(1.25 * self.size))
        runs = lay_out([title], font.getlength, self.right - self.left - 2 * self.size)
        first = "".join(run.text for run in runs if run.line == 0 and run.text != NEWLINE)
        more = "…" if runs[-1].line > 0 else ""
        self.text(self.left, self.size, first + more, 1.25, "DejaVuSerif-Bold")
        self.text(self.left, 2.9 * self.size, summary, 0.8)

    def tokens(self, x: float, y: float, runs: Sequence[Run], looks: Sequence[TokenLook], num_lines: int) -> None:
        """Lines of tokens; what is beyond `num_lines` is counted behind the last of them."""
        font = font_of("DejaVuSerif", self.size)
        height = LINE_HEIGHT * self.size
        baseline = round(1.22 * self.size)
        for run in runs:
            if run.line >= num_lines:
                break
            look = looks[run.token]
            left, right, top = round(x + run.x), round(x + run.x + run.width), round(y + run.line * height)
            if look.level is not None:
                bottom = top + round(1.6 * self.size)
                self._draw.rectangle((left, top, right - 1, bottom), LIGHT.levels[look.level])
            if run.text == NEWLINE:
                if look.level is not None:
                    colour = blend(LIGHT.levels[look.level], LIGHT.ink, 0.5)
                    self._draw.text((left, top + baseline), NEWLINE, colour, font, anchor="ls")
            else:
                self._draw.text((x + run.x, top + baseline), run.text, LIGHT.ink, font, anchor="ls")
            if look.changed:
                under = top + baseline + round(0.2 * self.size)
                self._draw.rectangle((left, under, right - 1, under + max(1, self.size // 12) - 1), LIGHT.ink)
        hidden = {run.token for run in runs if run.line >= num_lines}
        if hidden:
            end = max(run.x + run.width for run in runs if run.line == num_lines - 1)
            top = round(y + (num_lines - 1) * height)
            text = f"… {len(hidden):,} more"
            self._draw.text((x + end + self.size, top + baseline), text, LIGHT.faint, font, anchor="ls")

    def rule(self, y: int) -> None:
        """A thin line from margin to margin."""
        self._draw.line((self.left, y, self.right, y), LIGHT.rule, 2)

    def track(self, y: int, share: float) -> None:
        """How far the calls are."""
        thickness = self.size // 5
        self._draw.rectangle((self.left, y, self.right, y + thickness), LIGHT.rule)
        end = self.left + round(share * (self.right - self.left))
        self._draw.rectangle((self.left, y, end, y + thickness), LIGHT.accent)

    def legend(self, y: int) -> None:
        """The scale of confidence, and what else tokens look like."""
        font = font_of("DejaVuSans", round(0.75 * self.size))
        x = float(self.left)

        def write(text: str) -> None:
            nonlocal x
            self.text(x, y, text, 0.75)
            x += font.getlength(text)

        write("confidence  0% ")
        for colour in LIGHT.levels:
            self._draw.rectangle((round(x), y, round(x + self.size) - 1, y + round(0.9 * self.size)), colour)
            x += self.size
        write(" 100%")
        x += 2 * self.size
        start = x
        write("changed")
        under = y + round(0.95 * self.size)
        self._draw.rectangle((round(start), under, round(x), under + max(1, self.size // 12) - 1), LIGHT.ink)
        write(" by this call")
        x += 2 * self.size
        write("given: plain")


def margins(width: int, size: int) -> tuple[int, int]:
    """Where a line begins and ends, in pixels."""
    return int(1.5 * size), width - int(1.5 * size)


@cache
def font_of(name: Font, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that come with matplotlib; they have no Chinese, Japanese or Korean."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def blend(start: str, end: str, share: float) -> tuple[int, int, int]:
    """A colour between two, as a font's edges mix them."""
    mixed = [round(a + share * (b - a)) for a, b in zip(ImageColor.getrgb(start), ImageColor.getrgb(end), strict=True)]
    return mixed[0], mixed[1], mixed[2]
