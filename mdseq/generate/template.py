"""Texts with gaps: which parts are kept, and how many tokens are written between them.

`The king [[8]] and went [[4]] home` has two gaps, of eight and of four tokens. A text that holds such marks itself
takes another marker: with `<<N>>` as the marker, `<<8>>` is a gap and `[[8]]` is text.

A vocabulary writes a word together with the space before it. So the space that ends a kept part is left to the gap that
follows; in the text, it is where it was, and the gap does not bring a second one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mdseq.errors import UserError

GAP_MARKER = "[[N]]"
Part = str | int


@dataclass(frozen=True)
class Template:
    """A text with gaps.

    Attributes:
        parts: Texts that are kept, and the numbers of tokens of the gaps; not all of them texts.
    """

    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str, marker: str = GAP_MARKER) -> Template:
        """Read a text whose gaps are written as `marker` with a number in place of its N.

        Raises:
            UserError: There is no gap, or one of no tokens, or the marker is unusable.
        """
        before, letter, after = marker.partition("N")
        if not (before and letter and after) or "N" in after or re.search(r"\d", marker):
            raise UserError(
                f"gap marker {marker!r} is not allowed; give one N, for the number of tokens, with something on both "
                f"sides of it and no digits, such as {GAP_MARKER}"
            )
        pieces = re.split(f"{re.escape(before)}([0-9]+){re.escape(after)}", text)
        gaps = [int(piece) for piece in pieces[1::2]]
        example = marker.replace("N", "8")
        if not gaps:
            raise UserError(f"{_shortened(text)} has no gap to fill; write each as {example}, for eight tokens")
        if 0 in gaps:
            raise UserError(f"{_shortened(text)} has a gap of no tokens; write each as {example}, for eight tokens")
        parts = [gaps[index // 2] if index % 2 else piece for index, piece in enumerate(pieces)]
        return cls(tuple(part for part in parts if part != ""))

    @property
    def given(self) -> tuple[Part, ...]:
        """The parts as the model is given them: without a space before a gap."""
        following = (*self.parts[1:], "")
        return tuple(
            part[:-1] if isinstance(part, str) and part.endswith(" ") and isinstance(after, int) else part
            for part, after in zip(self.parts, following, strict=True)
        )

    def filled(self, texts: Sequence[str]) -> str:
        """The whole text, with these texts in its gaps; where text and gap both bring a space, there is one."""
        fills = iter(texts)
        written = [part if isinstance(part, str) else next(fills) for part in self.parts]
        neighbours = zip(("", *self.parts), self.parts, (*self.parts[1:], ""), strict=False)
        return "".join(
            text if isinstance(part, str) else _between(before, text, after)
            for text, (before, part, after) in zip(written, neighbours, strict=True)
        )


def _between(before: Part, text: str, after: Part) -> str:
    if isinstance(before, str) and before.endswith(" "):
        text = text.removeprefix(" ")
    if isinstance(after, str) and after.startswith(" "):
        text = text.removesuffix(" ")
    return text


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
