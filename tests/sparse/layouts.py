"""Layouts to test engines with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from mdseq.sparse import NO_DOCUMENT, Documents, Layout


def pack(
    lengths: Sequence[Sequence[int]], row_length: int, marked_share: float = 0.0, device: str = "cpu"
) -> Documents:
    """Rows of documents of these lengths, cut at the row's, then padding; this share of the tokens global."""
    b = len(lengths)
    document_bl = torch.full((b, row_length), NO_DOCUMENT)
    position_bl = torch.zeros(b, row_length, dtype=torch.long)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for document, length in enumerate(row_lengths):
            end = min(start + length, row_length)
            document_bl[row, start:end] = document
            position_bl[row, start:end] = torch.arange(end - start)
            start = end
    marked_bl = torch.rand(b, row_length, generator=torch.Generator().manual_seed(row_length)) < marked_share
    document_bl, position_bl, marked_bl = (x.to(device) for x in (document_bl, position_bl, marked_bl))
    documents = Documents(document_bl, position_bl, max(1, *map(len, lengths)))
    return documents.marked(marked_bl) if marked_share else documents


@st.composite
def layouts(draw: st.DrawFn, max_length: int = 90, device: str = "cpu") -> Layout:
    """Up to three rows of documents, some of length 0 or 1, with up to 64 global slots each or with marked tokens."""
    length = draw(st.integers(1, max_length))
    some_lengths = st.lists(st.just(0) | st.just(1) | st.integers(0, length), max_size=5)
    lengths = draw(st.lists(some_lengths, min_size=1, max_size=3))
    if draw(st.booleans()):
        return pack(lengths, length, device=device).layout(draw(st.integers(0, 64)))
    return pack(lengths, length, draw(st.sampled_from([0.1, 0.5, 1.0])), device).layout(draw(st.integers(0, 3)))
