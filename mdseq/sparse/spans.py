"""Queries that see the whole of their document: those of global slots, and all of them in a layer without a window.

Shapes: b batch, s slots, h heads, q queries, e head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mdseq.sparse.documents import Layout
from mdseq.sparse.tiles import TILE_SCORES, Heads, Shared, Source, add_gradients, attend_tile, head_groups

MAX_QUERIES = 128


@dataclass(frozen=True)
class Span:
    """One document of one row, as its slots.

    Attributes:
        keys: Its global slots and its tokens, either of which may be missing.
        queries: Those of its slots that see all of it, in pieces of at most MAX_QUERIES.
    """

    row: int
    keys: tuple[slice, ...]
    queries: tuple[slice, ...]


@dataclass(frozen=True)
class Spans:
    """All documents of a batch."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, layout: Layout, every_query: bool) -> Spans:
        """Take the tokens as queries too if `every_query`."""
        g = layout.num_global
        spans = []
        for row, document_s in enumerate(layout.document_bs.cpu().numpy()):
            at_global, at_token = _stretches(document_s[:g], 0), _stretches(document_s[g:], g)
            for document in sorted(at_global.keys() | at_token.keys()):
                keys = tuple(at[document] for at in (at_global, at_token) if document in at)
                queries = keys if every_query else tuple(at_global[document] for _ in range(document in at_global))
                if queries:
                    spans.append(Span(row, keys, tuple(piece for stretch in queries for piece in _pieces(stretch))))
        return cls(tuple(spans))


def attend_spans(spans: Spans, heads: Heads, out_bshe: Tensor) -> None:
    """Write the output of the spans' queries."""
    for span, queries, some in _tiles(spans, out_bshe.shape[2]):
        here = heads.at(span.row, some)
        out_h1qe = attend_tile(_block(here.q, queries), _sources(span, here))
        _block(out_bshe[span.row, :, some], queries).copy_(out_h1qe)


def add_span_gradients(spans: Spans, heads: Heads, out_bshe: Tensor, grad_bshe: Tensor, totals: Heads) -> None:
    """Add the gradients that come from the spans' queries."""
    for span, queries, some in _tiles(spans, out_bshe.shape[2]):
        here, total = heads.at(span.row, some), totals.at(span.row, some)
        out_h1qe, grad_h1qe = (_block(x_bshe[span.row, :, some], queries) for x_bshe in (out_bshe, grad_bshe))
        delta_h1q1 = (grad_h1qe * out_h1qe).sum(dim=-1, keepdim=True)
        sums = [rows for _, rows in _sources(span, total)]
        grad_q_h1qe = add_gradients(_block(here.q, queries), grad_h1qe, delta_h1q1, _sources(span, here), sums)
        _block(total.q, queries).add_(grad_q_h1qe)


def _tiles(spans: Spans, num_heads: int) -> Iterator[tuple[Span, slice, slice]]:
    """Some queries of a span, and some heads."""
    for span in spans.spans:
        num_keys = sum(rows.stop - rows.start for rows in span.keys)
        for queries in span.queries:
            for some in head_groups(num_heads, (queries.stop - queries.start) * num_keys, TILE_SCORES):
                yield span, queries, some


def _sources(span: Span, heads: Heads) -> list[Source]:
    return [(Shared(rows), heads.keys(slice(None))) for rows in span.keys]


def _block(x_she: Tensor, queries: slice) -> Tensor:
    """The queries as a single block, [h, 1, q, e]: a view."""
    return x_she[queries].transpose(0, 1)[:, None]


def _stretches(document_s: np.ndarray, offset: int) -> dict[int, slice]:
    """Where each document stands."""
    documents, first, count = np.unique(document_s, return_index=True, return_counts=True)
    return {
        int(document): slice(offset + int(start), offset + int(start + length))
        for document, start, length in zip(documents, first, count, strict=True)
        if document >= 0
    }


def _pieces(stretch: slice) -> Iterator[slice]:
    for start in range(stretch.start, stretch.stop, MAX_QUERIES):
        yield slice(start, min(start + MAX_QUERIES, stretch.stop))
