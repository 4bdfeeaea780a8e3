"""A trace as one page that needs nothing else: no network, no other file.

Shapes: c calls, l length (tokens).

The trace travels as JSON in the page; `trace.js` reads it:

    pieces      every different piece once
    given       a digit for each token: 1 given, 0 generated
    num_calls   calls that were made
    num_levels  steps of the scale of confidence
    frames      for each call:
      call, timestep, noise, mean_confidence, final_share
      gaps, tokens   the tokens that differ from the call before: how far each is from the one before it (the first is
                     counted from -1), and its index in `pieces`; at the first call, all tokens
      percent        confidence of every token in whole percent, a byte each, in base64
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import asdict
from hashlib import sha256
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from mdseq.report.trace import Trace
from mdseq.report.trace_colours import DARK, LIGHT, NUM_LEVELS, Palette


def page_of(trace: Trace) -> str:
    """The page. Its policy lets nothing run or load but its own script and style, whatever the pieces hold."""
    style = f"{_colours()}\n{_part('trace.css')}"
    script = _part("trace.js")
    generated = len(trace.given) - sum(trace.given)
    return Template(_part("trace.html")).substitute(
        title=escape(_readable(trace.title)),
        summary=f"{_count(generated, 'generated token')}, {len(trace.given) - generated:,} given, "
        f"{_count(trace.num_calls, 'denoiser call')}",
        style_hash=_hash(style),
        style=style,
        script_hash=_hash(script),
        script=script,
        last=len(trace.frames) - 1,
        # In a script element only "<" could end the data.
        trace=json.dumps(trace_data(trace), separators=(",", ":")).replace("<", "\\u003c"),
    )


def trace_data(trace: Trace) -> dict[str, Any]:
    """What the page knows, as described above."""
    frames = []
    for c, frame in enumerate(trace.frames):
        differs_l = trace.changed_cl[c] if c else np.ones(len(trace.given), dtype=bool)
        frames.append(
            {
                "call": frame.call,
                "timestep": frame.timestep,
                "noise": round(float(trace.noise_c[c]), 4),
                "mean_confidence": round(float(trace.mean_confidence_c[c]), 4),
                "final_share": round(float(trace.final_share_c[c]), 4),
                "gaps": np.diff(np.flatnonzero(differs_l), prepend=-1).tolist(),
                "tokens": trace.token_cl[c][differs_l].tolist(),
                "percent": b64encode(trace.percent_cl[c].tobytes()).decode(),
            }
        )
    return {
        "pieces": trace.vocabulary,
        "given": "".join("1" if given else "0" for given in trace.given),
        "num_calls": trace.num_calls,
        "num_levels": NUM_LEVELS,
        "frames": frames,
    }


def _part(name: str) -> str:
    return resources.files("mdseq.report").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """The part of the style that is about them: light, dark, and the classes of tokens."""
    light, dark = (f":root {{ {_properties(palette)} }}" for palette in (LIGHT, DARK))
    levels = (f".level-{level} {{ background: var(--level-{level}); }}" for level in range(NUM_LEVELS))
    return "\n".join((light, f"@media (prefers-color-scheme: dark) {{ {dark} }}", *levels))


def _properties(palette: Palette) -> str:
    """A palette as CSS custom properties."""
    colours = asdict(palette)
    levels = {f"level-{level}": colour for level, colour in enumerate(colours.pop("levels"))}
    return " ".join(f"--{name}: {colour};" for name, colour in (colours | levels).items())


def _hash(text: str) -> str:
    """By which a content security policy knows an inline script or style."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _readable(text: str) -> str:
    """Halves of surrogate pairs, which UTF-8 cannot hold, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
