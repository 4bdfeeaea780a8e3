"""Made-up traces: texts that emerge from noise."""

from __future__ import annotations

import re

import numpy as np

from mdseq.report.trace import Frame, Trace

NOISE = (
    " the",
    " of",
    "ing",
    " river",
    "\n",
    " a",
    "ness",
    " un",
    ",",
    " seven",
    "\ufffd",
    " fish",
    "er",
    " mill",
    ".",
)

# Pieces that would do harm, or get lost, if they were not treated as the text that they are.
HOSTILE = (
    "</script><img src=x onerror=\"document.title='harm';alert(1)\">",
    "<!--<script>",
    "</title><script>document.title = 'harm'</script>",
    "<b onclick=alert(1)>bold</b>",
    "&lt;&amp;&#60;",
    "${document.title='harm'}$title`\\`",
    "\"'\\u003c\\\\",
    "\u2028\u2029",
    "\udce2",
    "\x01\x7f",
    "__proto__",
)


def frame(*pieces: str, call: int = 0, timestep: float = 0.0, confidence: float = 0.5) -> Frame:
    return Frame(call, timestep, pieces, (confidence,) * len(pieces))


def emerging(text: str, num_given: int = 0, num_calls: int = 20, title: str = "A text", seed: int = 0) -> Trace:
    """Each token settles at a call of its own; until then it is noise, and others become likelier before it does."""
    rng = np.random.default_rng(seed)
    pieces = re.findall(r" ?\w{1,6}|[^\w ]| ", text)
    settles_l = rng.beta(2.5, 2.0, len(pieces)) * 0.95 * num_calls
    settles_l[:num_given] = -1
    certainty_l = rng.beta(12, 1, len(pieces))
    frames = []
    shown = [str(rng.choice(NOISE)) for _ in pieces]
    for call in range(num_calls):
        confidence = []
        for i, piece in enumerate(pieces):
            distance = call - settles_l[i]
            if distance >= 0 or (call == num_calls - 1):
                shown[i] = piece
            elif rng.random() < 0.5:
                shown[i] = str(rng.choice(NOISE))
            likely = certainty_l[i] / (1 + np.exp(-(distance + 1.0) / (0.12 * num_calls)))
            confidence.append(1.0 if i < num_given else float(np.clip(likely + rng.normal(0, 0.02), 0.01, 1)))
        timestep = 1999.0 * (1 - call / num_calls)
        frames.append(Frame(call, timestep, tuple(shown), tuple(confidence)))
    return Trace(title, tuple(i < num_given for i in range(len(pieces))), tuple(frames))
