"""Keeps what the sampler holds true at each call, to be shown as a picture.

Shapes: b batch, l length.
"""

from __future__ import annotations

from mdseq.data.tokenizer import Tokenizer
from mdseq.generate.rows import Row
from mdseq.generate.sampler import Estimate
from mdseq.report.trace import Frame, Trace


class TraceRecorder:
    """Observes the sampler, and keeps its estimates of one row.

    Args:
        tokenizer: Spells the tokens.
        row: The row, the first of its batch.
    """

    def __init__(self, tokenizer: Tokenizer, row: Row) -> None:
        self._tokenizer = tokenizer
        self._row = row
        self._frames: list[Frame] = []

    def __call__(self, estimate: Estimate) -> None:
        length = len(self._row)
        pieces = tuple(self._tokenizer.pieces(estimate.tokens_bl[0, :length].tolist()))
        confidence = tuple(estimate.confidence_bl[0, :length].tolist())
        self._frames.append(Frame(estimate.call, estimate.timestep, pieces, confidence))

    def trace(self, title: str) -> Trace:
        """What was kept."""
        return Trace(title, tuple((~self._row.target_l).tolist()), tuple(self._frames))
