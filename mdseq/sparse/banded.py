"""Attention in time and memory linear in the row's length, exact, on any device.

A dilated window is a dense window over every d-th token, so tokens are first regrouped by their residue modulo the
dilation; blocks of queries then meet the stretch of keys that their windows span, and the global keys of their
documents (`band.py`). Global queries, which are few, meet all of their document; so do all queries of a layer without a
window (`spans.py`).

On a GPU the plan is made with the host's help: there, this engine is for checking, not for speed.

Shapes: b batch, s slots, h heads, e head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.sparse.band import Band, Buffers, add_band_gradients, attend_band
from mdseq.sparse.documents import Layout
from mdseq.sparse.pattern import Pattern
from mdseq.sparse.spans import Spans, add_span_gradients, attend_spans
from mdseq.sparse.tiles import Heads, head_groups

# Values of a buffer: few enough for the third level of a processor's cache to hold a handful.
BUFFER_VALUES = 2**19


def attend_banded(q_bshe: Tensor, k_bshe: Tensor, v_bshe: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """See `mdseq.sparse.attend`."""
    return _Banded.apply(q_bshe, k_bshe, v_bshe, pattern, layout)


class _Banded(torch.autograd.Function):
    """Scores are never kept: the backward pass computes them again, tile by tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
        dtype = _precision(q)
        heads = Heads(*(x.to(dtype) for x in (q, k, v)))
        out_bshe = torch.zeros(q.shape, dtype=dtype, device=q.device)
        buffers = Buffers()
        for band, row, some in _bands(pattern, layout, q.shape):
            attend_band(band, row, heads.at(row, some), out_bshe[row, :, some], buffers)
        attend_spans(_spans(pattern, layout), heads, out_bshe)
        out_bshe = _clear_empty(out_bshe, layout).to(q.dtype)
        ctx.save_for_backward(q, k, v, out_bshe)
        ctx.pattern, ctx.layout = pattern, layout
        return out_bshe

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        pattern, layout, dtype = ctx.pattern, ctx.layout, _precision(q)
        heads = Heads(*(x.to(dtype) for x in (q, k, v)))
        totals = Heads(*(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)))
        out_bshe, grad_bshe = out.to(dtype), _clear_empty(grad.to(dtype, copy=True), layout)
        buffers = Buffers()
        for band, row, some in _bands(pattern, layout, q.shape):
            out_she, grad_she = out_bshe[row, :, some], grad_bshe[row, :, some]
            add_band_gradients(band, row, heads.at(row, some), out_she, grad_she, totals.at(row, some), buffers)
        add_span_gradients(_spans(pattern, layout), heads, out_bshe, grad_bshe, totals)
        return totals.q.to(q.dtype), totals.k.to(k.dtype), totals.v.to(v.dtype), None, None


def _bands(pattern: Pattern, layout: Layout, shape: torch.Size) -> Iterator[tuple[Band, int, slice]]:
    """What is done at a time: some heads of one dilation in one row; with their plan, which layers share."""
    window, (num_rows, num_slots, num_heads, head_dim) = pattern.window, shape
    if window is None:
        return
    for group, dilation in pattern.groups(num_heads):
        band = layout.plan(("band", window, dilation), partial(Band.of, layout, window, dilation))
        for row in range(num_rows):
            for some in head_groups(group.stop - group.start, num_slots * head_dim, BUFFER_VALUES):
                yield band, row, slice(group.start + some.start, group.start + some.stop)


def _spans(pattern: Pattern, layout: Layout) -> Spans:
    every_query = pattern.window is None
    return layout.plan(("spans", every_query), partial(Spans.of, layout, every_query))


def _clear_empty(x_bshe: Tensor, layout: Layout) -> Tensor:
    return x_bshe.masked_fill_(~layout.real_bs[:, :, None, None], 0.0)


def _precision(q: Tensor) -> torch.dtype:
    """Half precision is computed in fp32: processors have no fast products for it, and the result is better."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
