"""A record of one text emerging from noise, call by call of the denoiser, and the file that shows it.

Shapes: c calls, l length (tokens).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mdseq.errors import UserError


@dataclass(frozen=True)
class Frame:
    """What the sampler holds true at one denoiser call.

    Attributes:
        call: Counted from 0.
        timestep: Of the call.
        pieces: Each token as text, its spaces and newlines included.
        confidence: Probability of each token, in [0, 1].
    """

    call: int
    timestep: float
    pieces: tuple[str, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True)
class Trace:
    """The calls of one row.

    Attributes:
        title: Heading of the picture.
        given: Of each token, whether it stood there from the start instead of being generated.
        frames: In the order of the calls, at least one.
    """

    title: str
    given: tuple[bool, ...]
    frames: tuple[Frame, ...]

    def __post_init__(self) -> None:
        assert self.frames, "a trace without a call"
        for frame in self.frames:
            assert len(frame.pieces) == len(frame.confidence) == len(self.given), f"call {frame.call}: lengths differ"

    @property
    def num_calls(self) -> int:
        """Calls that were made, if the last of them is among the frames."""
        return self.frames[-1].call + 1

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The different pieces, in the order in which they appear."""
        return tuple(dict.fromkeys(piece for frame in self.frames for piece in frame.pieces))

    @cached_property
    def token_cl(self) -> np.ndarray:
        """Every piece as its index in the vocabulary, int64; pieces that read alike are the same token."""
        index = {piece: i for i, piece in enumerate(self.vocabulary)}
        return np.array([[index[piece] for piece in frame.pieces] for frame in self.frames], dtype=np.int64)

    @cached_property
    def percent_cl(self) -> np.ndarray:
        """Confidence in whole percent, uint8."""
        confidence_cl = np.array([frame.confidence for frame in self.frames], dtype=np.float64)
        assert not np.isnan(confidence_cl).any(), "confidence is a probability"
        return (100 * confidence_cl).round().clip(0, 100).astype(np.uint8)

    @cached_property
    def changed_cl(self) -> np.ndarray:
        """Whether a token is another than at the call before, bool; nothing has changed at the first."""
        changed_cl = np.zeros_like(self.token_cl, dtype=bool)
        changed_cl[1:] = self.token_cl[1:] != self.token_cl[:-1]
        return changed_cl

    @cached_property
    def mean_confidence_c(self) -> np.ndarray:
        """Mean confidence of the generated tokens; 1 when there are none."""
        confidence_cl = np.array([frame.confidence for frame in self.frames], dtype=np.float64)
        return _mean(confidence_cl[:, ~np.array(self.given, dtype=bool)])

    @cached_property
    def final_share_c(self) -> np.ndarray:
        """Share of the generated tokens that no later call changes; 1 when there are none."""
        changes_later_cl = np.zeros_like(self.changed_cl)
        changes_later_cl[:-1] = np.logical_or.accumulate(self.changed_cl[:0:-1], axis=0)[::-1]
        return _mean(~changes_later_cl[:, ~np.array(self.given, dtype=bool)])

    @cached_property
    def noise_c(self) -> np.ndarray:
        """Timestep of each call as a share of the noisiest one."""
        timestep_c = np.array([frame.timestep for frame in self.frames], dtype=np.float64)
        return timestep_c / (timestep_c.max() or 1.0)


def _mean(value_cl: np.ndarray) -> np.ndarray:
    return value_cl.mean(axis=1) if value_cl.shape[1] else np.ones(len(value_cl))


def check_trace_path(path: Path) -> None:
    """Whether `write_trace` can be asked for this file; worth knowing before the text is generated.

    Raises:
        UserError: Another suffix than .html, .gif or .png, or something of this name exists.
    """
    if path.suffix.lower() not in _FORMS:
        raise UserError(f"{path}: a trace is a page, an animation or a picture; let the name end in {_SUFFIXES}")
    if os.path.lexists(path):
        raise UserError(_exists(path))


def write_trace(trace: Trace, path: Path) -> None:
    """Show a trace, in the form that the suffix of the path asks for.

    Args:
        trace: What happened.
        path: File to create: .html, a page with a slider over the calls; .gif, an animation; .png, a few of the calls.

    Raises:
        UserError: Another suffix, or the file exists or cannot be written.
    """
    check_trace_path(path)
    content = _FORMS[path.suffix.lower()](trace)
    try:
        file = path.open("xb")
    except FileExistsError:  # it appeared while the content was made
        raise UserError(_exists(path)) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    try:
        with file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; make room, or choose another place") from None


def _exists(path: Path) -> str:
    return f"{path} exists and is never overwritten; remove it, or choose another name"


# What writes a form is loaded when it is wanted: matplotlib takes its time, and both build on this file.
def _page(trace: Trace) -> bytes:
    from mdseq.report.trace_page import page_of

    return page_of(trace).encode()


def _animation(trace: Trace) -> bytes:
    from mdseq.report.trace_image import animation_of

    return animation_of(trace)


def _still(trace: Trace) -> bytes:
    from mdseq.report.trace_image import still_of

    return still_of(trace)


_FORMS: dict[str, Callable[[Trace], bytes]] = {".html": _page, ".gif": _animation, ".png": _still}
_SUFFIXES = ".html, .gif or .png"
